{{- define "lloom.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "lloom.labels" -}}
app.kubernetes.io/name: lloom
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* The labels by which a part's pods are found. Arguments: (dict "root" $ "part" "validator") */}}
{{- define "lloom.selector" -}}
app.kubernetes.io/name: lloom
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "lloom.networkSecret" -}}
{{ .Values.network.secret | default (printf "%s-network" .Release.Name) }}
{{- end }}

{{- define "lloom.identitiesSecret" -}}
{{ .Values.network.identitiesSecret | default (printf "%s-validators" .Release.Name) }}
{{- end }}
