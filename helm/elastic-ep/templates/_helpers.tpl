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

{{/* Seconds that an agent gets to hand its ranks over: the grace of its pod, without 10 s for their end. */}}
{{- define "elastic-ep.drainGrace" -}}
{{- sub (int .Values.agents.terminationGracePeriodSeconds) 10 -}}
{{- end -}}

{{/* What the schema cannot say, since it is about two values. */}}
{{- define "elastic-ep.validate" -}}
{{- $values := .Values -}}
{{- if eq (int $values.service.containerPort) (int $values.service.adminPort) -}}
{{- fail "service.containerPort and service.adminPort are the same: choose another service.adminPort" -}}
{{- end -}}
{{- $pods := ($values.agents).replicas -}}
{{- if ne (($values.autoscaling).kind | default "none") "none" }}{{ $pods = $values.autoscaling.minReplicas }}{{ end -}}
{{- if and ($values.tests).deletePod (not (and ($values.tests).kill (eq $values.mode "many") (ge (int $pods) 2))) -}}
{{- fail "tests.deletePod: it comes after the kill, and other pods of agents must be there meanwhile: set tests.kill, mode: many, and agents.replicas, or autoscaling.minReplicas, of 2 or more" -}}
{{- end -}}
{{- if and ($values.tests).kill (not (and $values.admin.existingSecret (include "elastic-ep.adminIsReached" .))) -}}
{{- fail "tests.kill: the test asks the admin API to kill a rank: give its token by admin.existingSecret, and set service.adminHost to 0.0.0.0" -}}
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
{{- if and $values.model.volume (has (trimSuffix "/" $values.model.mountPath) (list "/state" "/tmp" "/dev/shm" "/etc/elastic-ep")) -}}
{{- fail (printf "model.mountPath: at %s the chart mounts a volume of its own: choose another path, such as /models" $values.model.mountPath) -}}
{{- end -}}
{{- $ours := list "host" "port" "admin-host" "admin-port" "state-dir" "cluster" "stop-grace" "only-on" "log-stdout" "admin-token-file" -}}
{{- include "elastic-ep.validateFlags" (dict "key" "extraArgs" "flags" $values.extraArgs "ours" $ours) -}}
{{- if eq $values.mode "many" }}{{ include "elastic-ep.validateMany" . }}{{ end -}}
{{- end -}}

{{- define "elastic-ep.validateFlags" -}}
{{- range .flags -}}
{{- $flag := trimPrefix "--" (first (splitList "=" .)) -}}
{{- if has $flag $.ours -}}
{{- fail (printf "%s: --%s is given by the chart, whose Service and probes rely on it" $.key $flag) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The same for pods of single roles. */}}
{{- define "elastic-ep.validateMany" -}}
{{- $values := .Values -}}
{{- include "elastic-ep.validateEtcd" . -}}
{{- range $role := list "init" "agents" "engine" "controller" "gateway" -}}
{{- if not (kindIs "map" (index $values $role)) }}{{ fail (printf "%s: null is no value of it: leave it out for the default" $role) }}{{ end -}}
{{- end -}}
{{- range $key := list "ranksPerPod" "follow" "minAgents" "terminationGracePeriodSeconds" -}}
{{- if kindIs "invalid" (index $values.agents $key) }}{{ fail (printf "agents.%s: null is no value of it: leave it out for the default" $key) }}{{ end -}}
{{- end -}}
{{- include "elastic-ep.validateScaling" . -}}
{{- if $values.state.persistence.enabled -}}
{{- fail "state.persistence is for mode: single: with many pods all state is in etcd" -}}
{{- end -}}
{{- if $values.extraArgs -}}
{{- fail "extraArgs are flags of `elastic serve`, which mode: many does not run: give init.extraArgs, agents.extraArgs, engine.extraArgs, controller.extraArgs or gateway.extraArgs" -}}
{{- end -}}
{{- if and $values.ranks $values.agents.follow -}}
{{- fail "ranks: the number of pods sets the size, agents.replicas x agents.ranksPerPod; or set agents.follow to false" -}}
{{- end -}}
{{- if and $values.agents.replicas (gt (int $values.agents.minAgents) (int $values.agents.replicas)) -}}
{{- fail (printf "agents.minAgents: the first ranks would wait for %d pods, and agents.replicas is %d" (int $values.agents.minAgents) (int $values.agents.replicas)) -}}
{{- end -}}
{{- if and (not $values.admin.existingSecret) (not (has $values.service.adminHost (list "127.0.0.1" "localhost"))) -}}
{{- fail "service.adminHost: gateways have no admin API without a token: give one by admin.existingSecret" -}}
{{- end -}}
{{- $ours := list "host" "port" "admin-host" "admin-port" "state-dir" "cluster" "node" "name" "stop-grace" "drain-grace" "admin-token-file" "capacity" "ranks" "follow-agents" "min-agents" "etcd" "advertise" "join-secret-file" "probe-port" -}}
{{- range list "init" "agents" "engine" "controller" "gateway" -}}
{{- include "elastic-ep.validateFlags" (dict "key" (printf "%s.extraArgs" .) "flags" (index $values .).extraArgs "ours" $ours) -}}
{{- end -}}
{{- end -}}

{{- define "elastic-ep.validateScaling" -}}
{{- $scaling := .Values.autoscaling | default dict -}}
{{- if ne ($scaling.kind | default "none") "none" -}}
{{- if .Values.agents.replicas -}}
{{- fail "agents.replicas: set it to null, the number of pods is the autoscaler's" -}}
{{- end -}}
{{- if not .Values.agents.follow -}}
{{- fail "autoscaling.kind: with agents.follow=false pods of agents are only room, and the size stays" -}}
{{- end -}}
{{- $least := int $scaling.minReplicas -}}
{{- if or (lt $least (int .Values.agents.minAgents)) (lt (int $scaling.maxReplicas) $least) -}}
{{- fail (printf "autoscaling.minReplicas: %d, which must be from agents.minAgents, %d, to autoscaling.maxReplicas, %d" $least (int .Values.agents.minAgents) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The objects without which Kubernetes does not start a container of this pod, a line each, as `|ConfigMap/name|`. From
     any part of its spec, by the fields that Kubernetes has for them wherever they are. */}}
{{- define "elastic-ep.needed" -}}
{{- if kindIs "map" . -}}
{{- range $field, $kind := dict "configMap" "ConfigMap" "configMapKeyRef" "ConfigMap" "configMapRef" "ConfigMap" "secret" "Secret" "secretKeyRef" "Secret" "secretRef" "Secret" "persistentVolumeClaim" "PersistentVolumeClaim" -}}
{{- $given := index $ $field -}}
{{- if kindIs "map" $given -}}
{{- if not $given.optional }}
|{{ $kind }}/{{ coalesce $given.name $given.secretName $given.claimName }}|
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .serviceAccountName }}
|ServiceAccount/{{ . }}|
{{- end -}}
{{- range . }}{{ include "elastic-ep.needed" . }}{{ end -}}
{{- else if kindIs "slice" . -}}
{{- range . }}{{ include "elastic-ep.needed" . }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* Helm makes what is no hook once the init Job has ended, which would wait for it until Helm's timeout. */}}
{{- define "elastic-ep.validateMadeBefore" -}}
{{- range $n, $object := .objects -}}
{{- $metadata := $object.metadata | default dict -}}
{{- $hook := index ($metadata.annotations | default dict) "helm.sh/hook" | default "" -}}
{{- if and (contains (printf "|%s/%s|" $object.kind $metadata.name) $.needed) (not (contains "pre-install" $hook)) -}}
{{- fail (printf "extraObjects[%d]: the init Job needs the %s %s before Helm makes it, and would wait for ever: make it yourself, or give it the annotations helm.sh/hook: pre-install,pre-upgrade,pre-rollback and helm.sh/hook-weight: \"-2\" (Helm then makes it anew each time, so no PersistentVolumeClaim)" $n $object.kind $metadata.name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
