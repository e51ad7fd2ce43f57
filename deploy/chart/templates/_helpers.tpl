{{/* The name of everything in the release. */}}
{{- define "nodeagent.name" -}}
{{- ternary .Release.Name (printf "%s-nodeagent" .Release.Name) (contains "nodeagent" .Release.Name) | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "nodeagent.account" -}}
{{- .Values.serviceAccount.name | default (include "nodeagent.name" .) -}}
{{- end -}}

{{- define "nodeagent.image" -}}
{{- .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ with .Values.image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{/* The agent's configuration, as YAML. */}}
{{- define "nodeagent.config" -}}
{{- $config := merge (dict "apiVersion" "nodeagent.dev/v1alpha1" "kind" "NodeAgentConfiguration") (deepCopy .Values.config) -}}
{{- if .Values.metrics.enabled -}}
{{- $listen := dict "listen" (printf "%s:%d" .Values.metrics.address (int .Values.metrics.port)) -}}
{{- $_ := set $config "metrics" (merge $listen (deepCopy ($config.metrics | default dict))) -}}
{{- end -}}
{{- with .Values.nvidia.driverRoot -}}
{{- $_ := set $config "nvidia" (merge (deepCopy ($config.nvidia | default dict)) (dict "driverRoot" (clean .))) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* What the manifests need of the configuration, with the agent's defaults, as YAML. */}}
{{- define "nodeagent.settings" -}}
{{- $config := .Values.config -}}
{{- $dra := $config.dra | default dict -}}
{{- $pinning := $config.pinning | default dict -}}
{{- $events := $config.events | default dict -}}
{{- $publish := $config.publish | default dict -}}
{{- $network := $config.network | default dict -}}
{{- $amd := $config.amd | default dict -}}
{{- $accelerators := $config.accelerators | default dict -}}
{{- $targets := list -}}
{{- range $config.resources | default list }}{{ $targets = concat $targets (.targets | default list) }}{{ end -}}
kubeletDir: {{ clean ($config.kubeletDir | default "/var/lib/kubelet") }}
stateDir: {{ clean ($config.stateDir | default "/var/lib/nodeagent") }}
runtimeDir: {{ clean ($config.runtimeDir | default "/run/nodeagent") }}
domain: {{ $config.domain | default "nodeagent.dev" }}
driver: {{ $dra.driver | default "nodeagent.dev" }}
cdiDir: {{ clean ($dra.cdiDir | default "/var/run/cdi") }}
deviceInfoDir: {{ with $network.deviceInfoDir }}{{ clean . }}{{ end }}
pins: {{ ne ($pinning.mode | default "auto") "off" }}
nri: {{ has ($pinning.mode | default "auto") (list "auto" "nri") }}
nriDir: {{ dir (clean ($pinning.nriSocket | default "/var/run/nri/nri.sock")) }}
partitions: {{ ne ($pinning.partition | default "none") "none" }}
binds: {{ $dra.bindingConditions | default false }}
events: {{ not (and (hasKey $events "enabled") (not $events.enabled)) }}
labels: {{ hasKey $publish "nodeLabels" }}
topology: {{ hasKey $publish "nodeResourceTopology" }}
pools: {{ gt (len ($config.hugepages | default list)) 0 }}
resctrl: {{ kindIs "map" $pinning.resctrl }}
targets: {{ gt (len $targets) 0 }}
leaseNamespace: {{ $dra.leaseNamespace | default .Release.Namespace }}
writesSys: {{ or (gt (len ($pinning.tuning | default dict)) 0) (gt (len ($dra.passthroughDrivers | default list)) 0) (gt (len ($network.vfs | default list)) 0) (gt (len ($amd.partitions | default list)) 0) (gt (len ($accelerators.dsa | default list)) 0) (gt (len $targets) 0) }}
{{- end -}}

{{/* Folders of the host that are mounted read only, as a YAML list; those in kubelet's folder are mounted with it. */}}
{{- define "nodeagent.hostFolders" -}}
{{- $settings := fromYaml (include "nodeagent.settings" .) -}}
{{- $kubelet := .Values.config.kubeletConfig | default dict -}}
{{- $named := .Values.hostFolders -}}
{{- with $kubelet.file }}{{ $named = append $named (dir .) }}{{ end -}}
{{- with $kubelet.dropIns }}{{ $named = append $named . }}{{ end -}}
{{- $found := list -}}
{{- range $named -}}
{{- $folder := clean . -}}
{{- if not (hasPrefix (printf "%s/" $settings.kubeletDir) (printf "%s/" $folder)) }}{{ $found = append $found $folder }}{{ end -}}
{{- end -}}
{{- toYaml (uniq $found) -}}
{{- end -}}

{{/* What the configuration says of the keys that are read at the start alone, as YAML: a change of it replaces the pods. */}}
{{- define "nodeagent.atStart" -}}
{{- $config := fromYaml (include "nodeagent.config" .) -}}
{{- range $path := .Files.Lines "keys-at-start.txt" -}}
{{- $value := $config -}}
{{- range splitList "." $path -}}
{{- $value = ternary (get (ternary $value dict (kindIs "map" $value)) .) "" (kindIs "map" $value) -}}
{{- end -}}
{{- if not (kindIs "invalid" $value) }}{{ if ne (toString $value) "" }}
{{ $path }}: {{ toJson $value }}
{{- end }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* What the chart cannot do, which no schema can say. */}}
{{- define "nodeagent.check" -}}
{{- $settings := fromYaml (include "nodeagent.settings" .) -}}
{{- $pinning := .Values.config.pinning | default dict -}}
{{- $dra := .Values.config.dra | default dict -}}
{{- if and $pinning.moveInterrupts (not .Values.privileged) -}}
{{- fail "cannot set config.pinning.moveInterrupts: /proc/irq is read only in a pod that is not privileged; run the agent under systemd on these nodes" -}}
{{- end -}}
{{- if and (has ($pinning.deviceInterrupts | default "") (list "follow" "avoid")) (not .Values.privileged) -}}
{{- fail "cannot set config.pinning.deviceInterrupts: /proc/irq is read only in a pod that is not privileged; run the agent under systemd on these nodes" -}}
{{- end -}}
{{- if and $pinning.tuning (not .Values.privileged) -}}
{{- fail "cannot set config.pinning.tuning: /sys/devices/system/cpu is read only in a pod that is not privileged; run the agent under systemd on these nodes" -}}
{{- end -}}
{{- if and $dra.passthroughDrivers (not .Values.privileged) -}}
{{- fail "cannot set config.dra.passthroughDrivers: /sys/bus/pci is read only in a pod that is not privileged; run the agent under systemd on these nodes" -}}
{{- end -}}
{{- if and (.Values.config.network | default dict).vfs (not .Values.privileged) -}}
{{- fail "cannot set config.network.vfs: /sys/bus/pci is read only in a pod that is not privileged; run the agent under systemd on these nodes" -}}
{{- end -}}
{{- if and (.Values.config.network | default dict).moveInterfaces (not .Values.privileged) -}}
{{- fail "cannot set config.network.moveInterfaces: a pod that is not privileged may not enter the network namespaces of others; set privileged, or run the agent under systemd on these nodes" -}}
{{- end -}}
{{- if and (.Values.config.network | default dict).vfProperties (not .Values.privileged) -}}
{{- fail "cannot set config.network.vfProperties: a pod that is not privileged may not change adapters; set privileged, or run the agent under systemd on these nodes" -}}
{{- end -}}
{{- if and (.Values.config.amd | default dict).partitions (not .Values.privileged) -}}
{{- fail "cannot set config.amd.partitions: /sys/devices is read only in a pod that is not privileged; run the agent under systemd on these nodes" -}}
{{- end -}}
{{- if and (.Values.config.accelerators | default dict).dsa (not .Values.privileged) -}}
{{- fail "cannot set config.accelerators.dsa: /sys is read only in a pod that is not privileged; set privileged, or run the agent under systemd on these nodes" -}}
{{- end -}}
{{- if and $settings.targets (not .Values.privileged) -}}
{{- fail "cannot serve config.resources of kind nvmeof: a pod that is not privileged may not open /dev/nvme-fabrics; set privileged, or run the agent under systemd on these nodes" -}}
{{- end -}}
{{- if and (or .Values.nvidia.driverRoot .Values.nvidia.libraryFolder) (not .Values.privileged) -}}
{{- fail "cannot use nvidia.driverRoot or nvidia.libraryFolder: a container that is not privileged may not open NVIDIA's device nodes; set nvidia.runtimeClassName instead, or privileged" -}}
{{- end -}}
{{- if $dra.kubeconfig -}}
{{- fail (printf "cannot use config.dra.kubeconfig %s: the pod talks to the API server with its service account, expected \"\"" $dra.kubeconfig) -}}
{{- end -}}
{{- if $dra.nodeName -}}
{{- fail (printf "cannot use config.dra.nodeName %s: every pod has the name of its own node, expected \"\"" $dra.nodeName) -}}
{{- end -}}
{{- $length := add (len $settings.kubeletDir) (len $settings.driver) -}}
{{- if gt $length 76 -}}
{{- fail (printf "cannot mount the driver's folder: config.kubeletDir and config.dra.driver have %d characters together, expected at most 76" $length) -}}
{{- end -}}
{{- range fromYamlArray (include "nodeagent.hostFolders" .) -}}
{{- if lt (len (splitList "/" .)) 3 -}}
{{- fail (printf "cannot mount %s: it would hide the image's own folder, expected one below it, such as %s/kubelet" . (trimSuffix "/" .)) -}}
{{- end -}}
{{- if hasPrefix (printf "%s/" .) $settings.kubeletDir -}}
{{- fail (printf "cannot mount %s: kubelet's folder %s lies in it, whose volumes the pod would hold" . $settings.kubeletDir) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.rbac.create (or $settings.labels $settings.topology) (not .Values.admissionPolicies.create) -}}
{{- fail "cannot grant what config.publish needs: without admissionPolicies.create every agent could change every Node; set it, or rbac.create false and grant it yourself" -}}
{{- end -}}
{{- if and .Values.metrics.prometheusRule.enabled (not .Values.metrics.enabled) -}}
{{- fail "cannot make a PrometheusRule: metrics.enabled is false, so there is nothing to be alerted of" -}}
{{- end -}}
{{- if and .Values.metrics.serviceMonitor.enabled (not .Values.metrics.enabled) -}}
{{- fail "cannot make a ServiceMonitor: metrics.enabled is false, so there is nothing to scrape" -}}
{{- end -}}
{{- end -}}
