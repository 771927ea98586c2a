{{- define "elastic-ep.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "elastic-ep.labels" -}}
app.kubernetes.io/name: elastic-ep
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "elastic-ep.selector" -}}
app.kubernetes.io/name: elastic-ep
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "elastic-ep.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "elastic-ep.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}
