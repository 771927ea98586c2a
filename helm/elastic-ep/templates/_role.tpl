{{/* A pod of one role (mode: many), from a dict: root (the top of the templates), role, command, args, and what it has
     beside every role's: model, shm, api, probe, first (true or not), grace (seconds), resources, restart. `first`: before
     its own container it runs `elastic init`. */}}
{{- define "elastic-ep.roleName" -}}
{{- printf "%s-%s" (include "elastic-ep.name" .root | trunc 41 | trimSuffix "-") .role -}}
{{- end -}}

{{- define "elastic-ep.roleSelector" -}}
{{ include "elastic-ep.selector" .root }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{- define "elastic-ep.roleLabels" -}}
{{ include "elastic-ep.labels" .root }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{/* The Secret with the join secret: yours, or the one that is made at the first install. */}}
{{- define "elastic-ep.joinSecret" -}}
{{- default (include "elastic-ep.roleName" (dict "root" . "role" "join")) .Values.join.existingSecret -}}
{{- end -}}

{{/* How every role finds the cluster, and `elastic status` by `kubectl exec`, too. */}}
{{- define "elastic-ep.roleEnv" -}}
{{ include "elastic-ep.env" . }}
- name: ELASTIC_ADVERTISE
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: ELASTIC_JOIN_SECRET_FILE
  value: /etc/elastic-ep/join/join-secret
- name: ELASTIC_CLUSTER
  value: {{ include "elastic-ep.name" . | quote }}
- name: ELASTIC_ETCD
  value: {{ include "elastic-ep.etcdEndpoints" . | quote }}
{{- if .Values.etcd.tlsSecret }}
- name: ELASTIC_ETCD_CA
  value: /etc/elastic-ep/etcd-tls/ca.crt
{{- if .Values.etcd.clientCertificate }}
- name: ELASTIC_ETCD_CERT
  value: /etc/elastic-ep/etcd-tls/tls.crt
- name: ELASTIC_ETCD_KEY
  value: /etc/elastic-ep/etcd-tls/tls.key
{{- end }}
{{- end }}
{{- with .Values.etcd.user }}
- name: ELASTIC_ETCD_USER
  value: {{ . | quote }}
- name: ELASTIC_ETCD_PASSWORD_FILE
  value: /etc/elastic-ep/etcd-user/password
{{- end }}
{{- end -}}

{{/* What a pod of agents ends with: its Kubernetes node, and the zone of that. Kubernetes gives pods the label from 1.35
     on; where it is missing the zone is empty, which is none. A value may be missing (`--reuse-values`). */}}
{{- define "elastic-ep.domainEnv" -}}
- name: ELASTIC_MACHINE
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
- name: ELASTIC_ZONE
  valueFrom:
    fieldRef:
      fieldPath: "metadata.labels['{{ .Values.agents.zoneLabel | default "topology.kubernetes.io/zone" }}']"
{{- end -}}

{{/* How many pods. Null: as many as there are, which are an autoscaler's or `kubectl scale`'s: without a number, where
     the last revision had one, Helm would remove it, and Kubernetes' default is one. From a dict: root, role, kind. */}}
{{- define "elastic-ep.replicas" -}}
{{- $wanted := (index .root.Values .role).replicas -}}
{{- if kindIs "invalid" $wanted -}}
{{- $wanted = ((lookup "apps/v1" .kind .root.Release.Namespace (include "elastic-ep.roleName" .)).spec | default dict).replicas -}}
{{- end -}}
{{- if not (kindIs "invalid" $wanted) }}
replicas: {{ int $wanted }}
{{- end }}
{{- end -}}

{{/* How many pods of a role may be evicted at once: one, and not the only one. Where the number is another's and may come
     to one, half of them: Kubernetes rounds so that the only one stays. From a dict: root, role. */}}
{{- define "elastic-ep.budget" -}}
{{- $replicas := (index .root.Values .role).replicas -}}
{{- $scaling := .root.Values.autoscaling | default dict -}}
{{- if and (kindIs "invalid" $replicas) (eq .role "agents") (ne ($scaling.kind | default "none") "none") -}}
{{- if gt (int $scaling.minReplicas) 1 }}{{ $replicas = $scaling.minReplicas }}{{ end -}}
{{- end -}}
{{- if kindIs "invalid" $replicas -}}
minAvailable: 50%
{{- else -}}
maxUnavailable: {{ ternary 0 1 (eq (int $replicas) 1) }}
{{- end -}}
{{- end -}}

{{/* What `elastic init` runs with: the cluster's settings and size. A dict of command, args, resources. */}}
{{- define "elastic-ep.init" -}}
{{- $args := list }}
{{- if .Values.agents.follow }}{{/* no number: agents make it, and another number of them must not replace who runs this */}}
{{- $args = append $args (printf "--follow-agents=%d" (int .Values.agents.ranksPerPod)) }}
{{- else if int .Values.ranks }}
{{- $args = append $args (printf "--ranks=%d" (int .Values.ranks)) }}
{{- end }}
{{- $args = concat $args (list (printf "--min-agents=%d" (int .Values.agents.minAgents))) }}
{{- with include "elastic-ep.modelArgs" . | trim }}{{ $args = concat $args (fromYamlArray .) }}{{ end }}
{{- dict "role" "init" "command" (list "elastic" "init" .Values.model.path) "args" (concat $args (.Values.init.extraArgs | default list)) "resources" .Values.init.resources "model" true | toYaml }}
{{- end -}}

{{/* One container, from the dict of its pod. */}}
{{- define "elastic-ep.roleContainer" -}}
- name: {{ .role }}
  {{- include "elastic-ep.image" .root | nindent 2 }}
  command: {{ toJson .command }}
  args: {{- concat (include "elastic-ep.etcdWaitArgs" .root | fromYamlArray) (.args | default list) | toYaml | nindent 4 }}
  env:
    {{- include "elastic-ep.roleEnv" .root | nindent 4 }}
    {{- if .shm }}
    {{- with include "elastic-ep.coresEnv" .resources | trim }}{{ nindent 4 . }}{{ end }}
    {{- include "elastic-ep.domainEnv" .root | nindent 4 }}
    {{- end }}
    {{- with .root.Values.extraEnv }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- include "elastic-ep.containerSecurity" .root | nindent 2 }}
  {{- if .api }}
  {{- include "elastic-ep.containerPorts" . | nindent 2 }}
  {{- include "elastic-ep.httpProbes" .root | nindent 2 }}
  {{- else if .probe }}
  {{- include "elastic-ep.containerPorts" . | nindent 2 }}
  readinessProbe:
    httpGet: {path: /readyz, port: probe}
    periodSeconds: 2
    timeoutSeconds: 2
  {{- end }}
  resources: {{- toYaml .resources | nindent 4 }}
  volumeMounts:
    - name: state
      mountPath: /state
    - name: tmp
      mountPath: /tmp
    - name: join
      mountPath: /etc/elastic-ep/join
      readOnly: true
    {{- if .shm }}
    - name: shm
      mountPath: /dev/shm
    {{- end }}
    {{- with include "elastic-ep.etcdMounts" .root | trim }}{{ nindent 4 . }}{{ end }}
    {{- if .api }}{{ with include "elastic-ep.apiMounts" .root | trim }}{{ nindent 4 . }}{{ end }}{{ end }}
    {{- if .model }}{{ with include "elastic-ep.modelMount" .root | trim }}{{ nindent 4 . }}{{ end }}{{ end }}
    {{- with .root.Values.extraVolumeMounts }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end -}}

{{/* Two pods of a role in one zone, or on one machine, would end with it together. From a dict: root, role. Members of etcd
     are on as many nodes as there are for them: two that are lost together are all of it. */}}
{{- define "elastic-ep.spread" -}}
topologySpreadConstraints:
  {{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    {{- if and (eq $.role "etcd") (eq $key "kubernetes.io/hostname") (semverCompare ">=1.26-0" $.root.Capabilities.KubeVersion.Version) }}
    whenUnsatisfiable: DoNotSchedule
    nodeTaintsPolicy: Honor  # nodes that take none of them do not count, nor one that is lost
    {{- else }}
    whenUnsatisfiable: ScheduleAnyway
    {{- end }}
    labelSelector:
      matchLabels: {{- include "elastic-ep.roleSelector" $ | nindent 8 }}
  {{- end }}
{{- end -}}

{{- define "elastic-ep.rolePod" -}}
{{- $values := .root.Values -}}
{{- $before := $values.extraInitContainers | default list -}}
{{- if .first -}}
{{- $before = concat $before (merge (dict "root" .root) (include "elastic-ep.init" .root | fromYaml) | include "elastic-ep.roleContainer" | fromYamlArray) -}}
{{- end -}}
metadata:
  labels: {{- include "elastic-ep.roleSelector" . | nindent 4 }}
  {{- with $values.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with .account }}
  serviceAccountName: {{ . | quote }}
  {{- end }}
  automountServiceAccountToken: false
  {{- with include "elastic-ep.extraPod" .root | trim }}{{ nindent 2 . }}{{ end }}
  {{- with .restart }}
  restartPolicy: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ int .grace }}
  securityContext: {{- toYaml $values.podSecurityContext | nindent 4 }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $before }}
  initContainers: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    {{- include "elastic-ep.roleContainer" . | nindent 4 }}
  volumes:
    - name: state
      emptyDir: {}
    - name: tmp
      emptyDir: {}
    - name: join
      secret:
        secretName: {{ include "elastic-ep.joinSecret" .root | quote }}
        defaultMode: 0440
    {{- if .shm }}
    {{- include "elastic-ep.shmVolume" .root | nindent 4 }}
    {{- end }}
    {{- with include "elastic-ep.etcdVolumes" .root | trim }}{{ nindent 4 . }}{{ end }}
    {{- if .api }}{{ with include "elastic-ep.apiVolumes" .root | trim }}{{ nindent 4 . }}{{ end }}{{ end }}
    {{- if or .model .first }}{{ with include "elastic-ep.modelVolume" .root | trim }}{{ nindent 4 . }}{{ end }}{{ end }}
    {{- with $values.extraVolumes }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- include "elastic-ep.spread" . | nindent 2 }}
  {{- with include "elastic-ep.scheduling" .root | trim }}{{ nindent 2 . }}{{ end }}
{{- end -}}
