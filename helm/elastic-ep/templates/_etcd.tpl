{{/* The etcd of the chart (mode: many without etcd.endpoints): three pods, whose names are known before they are there. */}}
{{- define "elastic-ep.ownEtcd" -}}
{{- if and (eq .Values.mode "many") (not .Values.etcd.endpoints) }}true{{ end -}}
{{- end -}}

{{- define "elastic-ep.etcdName" -}}
{{- include "elastic-ep.roleName" (dict "root" . "role" "etcd") -}}
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
