{{/* Parts of a pod's spec that the one pod and the pods of single roles have in common. */}}
{{- define "elastic-ep.image" -}}
image: "{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end -}}

{{/* A value may be missing, since `helm upgrade --reuse-values` knows none that has come since the last one: its flag then, too. */}}
{{- define "elastic-ep.modelArgs" -}}
{{- with .Values.redundancy }}
- --redundancy={{ . }}
{{- end }}
{{- with .Values.dtype }}
- --dtype={{ . }}
{{- end }}
{{- with .Values.exactness }}
- --exactness={{ . }}
{{- end }}
{{- with .Values.model.servedName }}
- {{ printf "--served-model-name=%s" . | quote }}
{{- end }}
{{- with .Values.maxModelLen }}
- --max-model-len={{ int64 . }}
{{- end }}
{{- end -}}

{{/* A pod may start before etcd, and its name is not known at once. The one flag that is never left to the command line,
     where a missing one means one try (`elastic serve`) or 30 s (roles). Zero is a number, which `default` would not see. */}}
{{- define "elastic-ep.etcdWaitArgs" -}}
{{- $wait := .Values.etcd.waitSeconds -}}
- --etcd-wait={{ ternary 120 $wait (kindIs "invalid" $wait) | int }}s
{{- end -}}

{{- define "elastic-ep.listenArgs" -}}
- --host=0.0.0.0
- --port={{ int .Values.service.containerPort }}
- {{ printf "--admin-host=%s" .Values.service.adminHost | quote }}
- --admin-port={{ int .Values.service.adminPort }}
- --stop-grace={{ include "elastic-ep.stopGrace" . }}s
{{- end -}}

{{- define "elastic-ep.apiArgs" -}}
{{- with .Values.maxOpenRequests }}
- --max-open-requests={{ int64 . }}
{{- end }}
{{- if .Values.api.keysSecret }}
- --api-key-file=/etc/elastic-ep/api-keys/keys
{{- end }}
{{- if .Values.api.tlsSecret }}
- --ssl-certfile=/etc/elastic-ep/api-tls/tls.crt
- --ssl-keyfile=/etc/elastic-ep/api-tls/tls.key
{{- end }}
{{- end -}}

{{- define "elastic-ep.env" -}}
- name: OMP_NUM_THREADS
  value: "1"
- name: HF_HUB_OFFLINE
  value: "1"
- name: HOME
  value: /state
- name: ELASTIC_STATE_DIR
  value: /state
- name: ELASTIC_NODE
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- end -}}

{{/* How many cores the ranks of a pod share among them: those of its limit, else those it asked for. Without a limit they
     would count all of the machine, as those of any other pod there do. From the container's resources. */}}
{{- define "elastic-ep.coresEnv" -}}
{{- $given := . | default dict -}}
{{- $which := ternary "limits" "requests" (hasKey ($given.limits | default dict) "cpu") -}}
{{- if hasKey ((index $given $which) | default dict) "cpu" }}
- name: ELASTIC_CORES
  valueFrom:
    resourceFieldRef:
      resource: {{ $which }}.cpu
{{- end }}
{{- end -}}

{{/* Of a pod, as you give it. */}}
{{- define "elastic-ep.extraPod" -}}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "elastic-ep.containerSecurity" -}}
# A start that failed says why in its last line, which `kubectl describe pod` shows.
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: ["ALL"]
{{- end -}}

{{- define "elastic-ep.httpProbes" -}}
# Loading a model takes as long as it takes: startup is patient, liveness then is not.
startupProbe:
  httpGet: {path: /livez, port: http, scheme: {{ ternary "HTTPS" "HTTP" (ne .Values.api.tlsSecret "") }}}
  periodSeconds: 2
  failureThreshold: 150
livenessProbe:
  httpGet: {path: /livez, port: http, scheme: {{ ternary "HTTPS" "HTTP" (ne .Values.api.tlsSecret "") }}}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: http, scheme: {{ ternary "HTTPS" "HTTP" (ne .Values.api.tlsSecret "") }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
lifecycle:
  preStop:
    exec:
      command: ["sleep", {{ int .Values.preStopSeconds | quote }}]
{{- end -}}

{{- define "elastic-ep.etcdMounts" -}}
{{- if .Values.etcd.tlsSecret }}
- name: etcd-tls
  mountPath: /etc/elastic-ep/etcd-tls
  readOnly: true
{{- end }}
{{- if .Values.etcd.user }}
- name: etcd-user
  mountPath: /etc/elastic-ep/etcd-user
  readOnly: true
{{- end }}
{{- end -}}

{{- define "elastic-ep.etcdVolumes" -}}
{{- with .Values.etcd.tlsSecret }}
- name: etcd-tls
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
{{- end }}
{{- if .Values.etcd.user }}
- name: etcd-user
  secret:
    secretName: {{ required "etcd.passwordSecret: etcd.user needs a Secret with its password" .Values.etcd.passwordSecret | quote }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{- define "elastic-ep.apiMounts" -}}
{{- if .Values.admin.existingSecret }}
- name: admin-token
  mountPath: /etc/elastic-ep/admin
  readOnly: true
{{- end }}
{{- if .Values.api.keysSecret }}
- name: api-keys
  mountPath: /etc/elastic-ep/api-keys
  readOnly: true
{{- end }}
{{- if .Values.api.tlsSecret }}
- name: api-tls
  mountPath: /etc/elastic-ep/api-tls
  readOnly: true
{{- end }}
{{- end -}}

{{- define "elastic-ep.apiVolumes" -}}
{{- with .Values.admin.existingSecret }}
- name: admin-token
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
{{- end }}
{{- with .Values.api.keysSecret }}
- name: api-keys
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
{{- end }}
{{- with .Values.api.tlsSecret }}
- name: api-tls
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{- define "elastic-ep.modelMount" -}}
{{- if .Values.model.volume }}
- name: model
  mountPath: {{ .Values.model.mountPath | quote }}
  readOnly: true
{{- end }}
{{- end -}}

{{- define "elastic-ep.modelVolume" -}}
{{- with .Values.model.volume }}
- name: model
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "elastic-ep.shmVolume" -}}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.sharedMemory.size | quote }}
{{- end -}}

{{- define "elastic-ep.scheduling" -}}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
