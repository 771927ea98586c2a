{{/* A name that a Service and a pod may have: a release may be called 123, 1e3 or my.release. */}}
{{- define "elastic-ep.name" -}}
{{- $name := .Release.Name | toString | lower | replace "." "-" -}}
{{- if not (regexMatch "^[a-z]" $name) }}{{ $name = printf "elastic-ep-%s" $name }}{{ end -}}
{{- $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "elastic-ep.labels" -}}
{{ include "elastic-ep.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end -}}

{{- define "elastic-ep.selector" -}}
app.kubernetes.io/name: elastic-ep
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "elastic-ep.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "elastic-ep.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Seconds that streams get to end: the grace of the pod without preStop, and without 10 s for ranks and etcd. */}}
{{- define "elastic-ep.stopGrace" -}}
{{- $grace := sub (int .Values.terminationGracePeriodSeconds) (add (int .Values.preStopSeconds) 10) -}}
{{- if lt (int $grace) 1 -}}
{{- fail (printf "terminationGracePeriodSeconds: %d is too short, streams would be cut: give at least preStopSeconds + 11 = %d" (int .Values.terminationGracePeriodSeconds) (add (int .Values.preStopSeconds) 11)) -}}
{{- end -}}
{{- $grace -}}
{{- end -}}

{{/* What the schema cannot say, since it is about two values. */}}
{{- define "elastic-ep.validate" -}}
{{- $values := .Values -}}
{{- if eq (int $values.service.containerPort) (int $values.service.adminPort) -}}
{{- fail "service.containerPort and service.adminPort are the same: choose another service.adminPort" -}}
{{- end -}}
{{- if and (not $values.etcd.endpoints) (or $values.etcd.user $values.etcd.tlsSecret) -}}
{{- fail "etcd.user and etcd.tlsSecret are for an etcd of yours: name it by etcd.endpoints" -}}
{{- end -}}
{{- if and $values.etcd.clientCertificate (not $values.etcd.tlsSecret) -}}
{{- fail "etcd.clientCertificate needs etcd.tlsSecret, a Secret with tls.crt and tls.key" -}}
{{- end -}}
{{- if and $values.model.volume (not (hasPrefix (printf "%s/" (trimSuffix "/" $values.model.mountPath)) (printf "%s/" $values.model.path))) -}}
{{- fail (printf "model.path: %s is not below model.mountPath, %s, where model.volume is mounted" $values.model.path $values.model.mountPath) -}}
{{- end -}}
{{- $ours := list "host" "port" "admin-host" "admin-port" "state-dir" "cluster" "stop-grace" "only-on" "log-stdout" "admin-token-file" -}}
{{- range $values.extraArgs -}}
{{- $flag := trimPrefix "--" (first (splitList "=" .)) -}}
{{- if has $flag $ours -}}
{{- fail (printf "extraArgs: --%s is given by the chart, whose Service and probes rely on it" $flag) -}}
{{- end -}}
{{- end -}}
{{- end -}}
