{{/* The etcd of the chart (mode: many without etcd.endpoints): three pods, whose names are known before they are there. */}}
{{- define "elastic-ep.ownEtcd" -}}
{{- if and (eq .Values.mode "many") (not .Values.etcd.endpoints) }}true{{ end -}}
{{- end -}}

{{- define "elastic-ep.etcdName" -}}
{{- include "elastic-ep.roleName" (dict "root" . "role" "etcd") -}}
{{- end -}}

{{/* Whether two of its members are ready, which is enough. Where Helm sees no cluster (`helm template`, Argo CD) it is not. */}}
{{- define "elastic-ep.etcdAnswers" -}}
{{- $there := lookup "apps/v1" "StatefulSet" .Release.Namespace (include "elastic-ep.etcdName" .) -}}
{{- if ge (int (dig "status" "readyReplicas" 0 $there)) 2 }}true{{ end -}}
{{- end -}}

{{/* Another etcd is another cluster: its pods would come beside those of the one that serves, and take its place. By what
     the agents of this release were given. */}}
{{- define "elastic-ep.validateEtcd" -}}
{{- $own := include "elastic-ep.etcdUrls" (dict "root" . "port" 2379 "named" false) -}}
{{- $agents := lookup "apps/v1" "StatefulSet" .Release.Namespace (include "elastic-ep.roleName" (dict "root" . "role" "agents")) -}}
{{- range $container := dig "spec" "template" "spec" "containers" list $agents -}}
{{- range $container.env -}}
{{- if eq .name "ELASTIC_ETCD" -}}
{{- if ne (eq .value $own) (eq (include "elastic-ep.ownEtcd" $) "true") -}}
{{- fail (printf "etcd.endpoints: the roles of this release use %s, and with these values they would use %s, which is another cluster: keep it, or install a second release and move clients" .value (include "elastic-ep.etcdEndpoints" $)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Its members' URLs, from a dict: root, port, and a `%s` for the name where `each` has one. */}}
{{- define "elastic-ep.etcdUrls" -}}
{{- $name := include "elastic-ep.etcdName" .root -}}
{{- $urls := list -}}
{{- range $n := until 3 }}
{{- $member := printf "%s-%d" $name $n -}}
{{- $url := printf "http://%s.%s:%d" $member $name (int $.port) -}}
{{- $urls = append $urls (ternary (printf "%s=%s" $member $url) $url (eq $.named true)) -}}
{{- end -}}
{{- join "," $urls -}}
{{- end -}}

{{/* Where the roles find etcd: yours, or that of the chart. */}}
{{- define "elastic-ep.etcdEndpoints" -}}
{{- if .Values.etcd.endpoints -}}
{{- join "," .Values.etcd.endpoints -}}
{{- else -}}
{{- include "elastic-ep.etcdUrls" (dict "root" . "port" 2379 "named" false) -}}
{{- end -}}
{{- end -}}
