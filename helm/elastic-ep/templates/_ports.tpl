{{/* Where each role listens for other pods, and which roles connect there: the containers' ports and the NetworkPolicies
     are made of this one table. Without `port` the kernel chooses it. `from`: roles, or `clients` and `admins`, who are
     values; so are `scrapers`, of a probe: the kubelet needs no rule. tests/integration/test_helm_policies.py holds it
     against the sockets in the code. */}}
{{- define "elastic-ep.adminIsReached" -}}
{{- if not (has .Values.service.adminHost (list "127.0.0.1" "localhost" "::1")) }}true{{ end -}}
{{- end -}}

{{- define "elastic-ep.listeners" -}}
{{- $ports := .Values.service -}}
{{- range $role := ternary (list "gateway") (list "serve") (eq .Values.mode "many") }}
{{ $role }}:
  - {name: http, port: {{ int $ports.containerPort }}, from: [clients]}
  {{- if include "elastic-ep.adminIsReached" $ }}
  - {name: admin, port: {{ int $ports.adminPort }}, from: [admins]}
  {{- end }}
{{- end }}
{{- if eq .Values.mode "many" }}
engine:
  - {name: probe, port: {{ include "elastic-ep.probePort" . }}, from: [scrapers]}
  - {name: steps, from: [agents]}
  - {name: prompts, from: [gateway]}
agents:
  - {name: probe, port: {{ include "elastic-ep.probePort" . }}, from: [scrapers]}
  - {name: answers, from: [engine]}
  - {name: rows, from: [agents]}
  - {name: weights, from: [agents, gateway]}
controller:
  - {name: probe, port: {{ include "elastic-ep.probePort" . }}, from: [scrapers]}
init: []
{{- if include "elastic-ep.ownEtcd" . }}
etcd:
  - {name: client, port: 2379, from: [agents, controller, engine, gateway, init]}
  - {name: peer, port: 2380, from: [etcd]}
  - {name: health, port: 2381, from: [scrapers]}
{{- end }}
{{- end }}
{{- end -}}

{{/* Where a role without an API says whether it has begun its work. Not a value: nobody but the kubelet and Prometheus asks there. */}}
{{- define "elastic-ep.probePort" -}}8002{{- end -}}

{{/* The ports of a role's container, from a dict: root, role. */}}
{{- define "elastic-ep.containerPorts" -}}
ports:
{{- range index (include "elastic-ep.listeners" .root | fromYaml) .role }}
{{- if .port }}
  - name: {{ .name }}
    containerPort: {{ int .port }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Pods of a role, as a peer of a NetworkPolicy, from a dict: root, role. */}}
{{- define "elastic-ep.rolePeer" -}}
podSelector:
  matchLabels: {{- include "elastic-ep.roleSelector" . | nindent 4 }}
{{- end -}}

{{/* The pod of `helm test`, which is a client. */}}
{{- define "elastic-ep.testPeer" -}}
podSelector:
  matchLabels:
    app.kubernetes.io/name: elastic-ep-test
    app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* The port of one of etcd's URLs. */}}
{{- define "elastic-ep.portOf" -}}
{{- regexFind "[0-9]+$" (urlParse .).host | default "2379" -}}
{{- end -}}
