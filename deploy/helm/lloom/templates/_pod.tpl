{{/*
The parts of every pod with a Lloom node. In this order:

  lloom-home   prepares the node's home: identity, network key, validators
  lloom-p2pd   native sidecar: the libp2p daemon
  lloom        the node itself: a native sidecar beside an application, the main container of every other pod

The home and the sockets are volumes that an application's container does not mount; p2pd's has the sockets' alone.
*/}}

{{- define "lloom.env" -}}
- {name: LLOOM_P2PD_CONTROL, value: /unix/run/lloom/p2pd.sock}
- {name: LLOOM_DHT, value: server}
- {name: LLOOM_LOG_FORMAT, value: json}
{{- end }}

{{/* Settings as variables, from a map. */}}
{{- define "lloom.settings" -}}
{{- range $name, $value := . }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{/* Volumes of a node whose identity lasts as long as its pod. */}}
{{- define "lloom.volumes" -}}
- name: lloom-home
  emptyDir: {}
{{ include "lloom.sharedVolumes" . }}
{{- end }}

{{- define "lloom.sharedVolumes" -}}
- name: lloom-run
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
- name: lloom-tmp
  emptyDir: {sizeLimit: 64Mi}
- name: lloom-network
  secret: {secretName: {{ include "lloom.networkSecret" . }}, defaultMode: 0440}
{{- end }}

{{- define "lloom.homeContainer" -}}
- name: lloom-home
  image: {{ include "lloom.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args:
    - init
    - --home=/var/lib/lloom/home
    - --network=/network
    - --p2pd-home=/run/lloom/p2pd
    {{- if .identities }}
    # A validator's peer id is in everybody's bootstrap list: its identity was made before it.
    - --identity=/identities/$(POD_NAME)
    {{- end }}
  env:
    - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
  volumeMounts:
    - {name: lloom-home, mountPath: /var/lib/lloom}
    - {name: lloom-run, mountPath: /run/lloom}
    - {name: lloom-tmp, mountPath: /tmp}
    - {name: lloom-network, mountPath: /network, readOnly: true}
    {{- if .identities }}
    - {name: lloom-identities, mountPath: /identities, readOnly: true}
    {{- end }}
  resources:
    requests: {cpu: 50m, memory: 64Mi}
    limits: {memory: 256Mi}
  securityContext: {{- toYaml .Values.containerSecurityContext | nindent 4 }}
{{- end }}

{{/* Arguments: the root merged with (dict "roles" "client" "extraEnv" map) */}}
{{- define "lloom.p2pdContainer" -}}
- name: lloom-p2pd
  image: {{ include "lloom.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  restartPolicy: Always
  args: [p2pd]
  env:
    - {name: LLOOM_HOME, value: /run/lloom/p2pd}
    {{- include "lloom.env" . | nindent 4 }}
    - {name: LLOOM_ROLES, value: {{ .roles | quote }}}
    - {name: GOMEMLIMIT, value: 400MiB}
    {{- with .extraEnv }}
    {{- include "lloom.settings" . | trim | nindent 4 }}
    {{- end }}
  ports:
    - {name: p2p, containerPort: 4001, protocol: TCP}
    - {name: p2p-quic, containerPort: 4001, protocol: UDP}
  startupProbe:
    # The node does not start before p2pd listens.
    tcpSocket: {port: p2p}
    periodSeconds: 1
    failureThreshold: 60
  volumeMounts:
    - {name: lloom-run, mountPath: /run/lloom}
  resources: {{- toYaml .Values.p2pd.resources | nindent 4 }}
  securityContext: {{- toYaml .Values.containerSecurityContext | nindent 4 }}
{{- end }}

{{/* Arguments as above, and "resources", "isSidecar", "extraMounts". */}}
{{- define "lloom.nodeContainer" -}}
- name: lloom
  image: {{ include "lloom.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  {{- if .isSidecar }}
  restartPolicy: Always
  {{- end }}
  args: [run]
  env:
    - {name: LLOOM_HOME, value: /var/lib/lloom/home}
    {{- include "lloom.env" . | nindent 4 }}
    - {name: LLOOM_ROLES, value: {{ .roles | quote }}}
    # The kubelet probes the pod's address. Nothing secret is served there.
    - {name: LLOOM_PROBE, value: "0.0.0.0:4881"}
    {{- with .extraEnv }}
    {{- include "lloom.settings" . | trim | nindent 4 }}
    {{- end }}
  ports:
    - {name: metrics, containerPort: 4881, protocol: TCP}
    {{- if .apiPort }}
    - {name: api, containerPort: {{ .apiPort }}, protocol: TCP}
    {{- end }}
  startupProbe:
    httpGet: {path: /startupz, port: metrics}
    periodSeconds: 1
    failureThreshold: 120
  livenessProbe:
    httpGet: {path: /livez, port: metrics}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  readinessProbe:
    # The API listens and p2pd answers. Never about peers: an application stays ready when a validator is away.
    httpGet: {path: /readyz, port: metrics}
    periodSeconds: 2
    timeoutSeconds: 3
  volumeMounts:
    - {name: lloom-run, mountPath: /run/lloom}
    - {name: lloom-home, mountPath: /var/lib/lloom}
    - {name: lloom-tmp, mountPath: /tmp}
    {{- with .extraMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources: {{- toYaml .resources | nindent 4 }}
  securityContext: {{- toYaml .Values.containerSecurityContext | nindent 4 }}
{{- end }}

{{/*
For the pods of your own chart's applications, with this chart as a dependency called "lloom":

  spec:
    initContainers: {{- include "lloom.client.initContainers" .Subcharts.lloom | nindent 8 }}
    containers:
      - name: app
        env: [{name: OPENAI_BASE_URL, value: "http://127.0.0.1:4880/v1"}]
    volumes: {{- include "lloom.client.volumes" .Subcharts.lloom | nindent 8 }}

There is no preStop: a native sidecar ends after the application.
*/}}
{{- define "lloom.client.initContainers" -}}
{{- $args := merge (dict "roles" "client" "extraEnv" dict "isSidecar" true "resources" .Values.client.resources) . -}}
{{ include "lloom.homeContainer" $args }}
{{ include "lloom.p2pdContainer" $args }}
{{ include "lloom.nodeContainer" $args }}
{{- end }}

{{- define "lloom.client.volumes" -}}
{{ include "lloom.volumes" . }}
{{- end }}
