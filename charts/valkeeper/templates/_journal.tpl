{{- /* What the operator would refuse at its start, or could not write to, is said before anything is installed. The numbers are those of
src/args.rs and of keep_max in src/run.rs; tests there compare them. */ -}}

{{- /* The number of the smallest unit that a size (Ki, Mi: bytes) or a time (s, m, h, d: seconds) is. */ -}}
{{- define "valkeeper.amount" -}}
{{- $unit := regexFind "[A-Za-z]+$" . -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "s" 1 "m" 60 "h" 3600 "d" 86400 -}}
{{- mul (atoi (trimSuffix $unit .)) (get $units $unit) -}}
{{- end -}}

{{- /* "yes" if a directory is within a mount that can be written to; the mount itself counts if `itself` is set. */ -}}
{{- define "valkeeper.isMounted" -}}
{{- $directory := clean .directory -}}
{{- $itself := .itself -}}
{{- $found := "" -}}
{{- range .mounts -}}
{{- $mount := clean .mountPath -}}
{{- $within := hasPrefix (printf "%s/" (trimSuffix "/" $mount)) $directory -}}
{{- if and (not .readOnly) (or $within (and $itself (eq $mount $directory))) -}}
{{- $found = "yes" -}}
{{- end -}}
{{- end -}}
{{- $found -}}
{{- end -}}

{{- define "valkeeper.checkJournal" -}}
{{- $journal := .Values.journal -}}
{{- $mounts := .Values.extraVolumeMounts -}}
{{- $inConfigMaps := or (eq $journal "configmap") (hasPrefix "tiered:" $journal) -}}

{{- with .Values.journalKeep -}}
{{- $least := "16Ki" -}}
{{- $most := ternary "768Ki" "48Mi" $inConfigMaps -}}
{{- $bytes := int64 (include "valkeeper.amount" .) -}}
{{- if or (lt $bytes (int64 (include "valkeeper.amount" $least))) (gt $bytes (int64 (include "valkeeper.amount" $most))) -}}
{{- fail (printf "journalKeep is %s: from %s to %s of a journal can be kept with journal %s" . $least $most $journal) -}}
{{- end -}}
{{- end -}}

{{- with .Values.journalKeepAge -}}
{{- $least := "1h" -}}
{{- if lt (int64 (include "valkeeper.amount" .)) (int64 (include "valkeeper.amount" $least)) -}}
{{- fail (printf "journalKeepAge is %s: it is at least %s, such as 90d" . $least) -}}
{{- end -}}
{{- end -}}

{{- with .Values.journalKeepDeleted -}}
{{- $shortest := "10m" -}}
{{- if and (ne . "forever") (lt (int64 (include "valkeeper.amount" .)) (int64 (include "valkeeper.amount" $shortest))) -}}
{{- fail (printf "journalKeepDeleted is %s: it is at least %s, such as 30d, or forever" . $shortest) -}}
{{- end -}}
{{- end -}}

{{- if regexMatch "^(sled|tiered):" $journal -}}
{{- $directory := regexReplaceAll "^(sled|tiered):" $journal "" -}}
{{- if not (include "valkeeper.isMounted" (dict "directory" $directory "mounts" $mounts "itself" false)) -}}
{{- fail (printf "journal is %s: %s must be a directory within the mountPath of one of extraVolumeMounts, not the mount itself, and not readOnly; all else of the operator's pod is read-only" $journal $directory) -}}
{{- end -}}
{{- end -}}

{{- $url := .Values.archive.url -}}
{{- if hasPrefix "file://" $url -}}
{{- $directory := trimPrefix "file://" $url -}}
{{- if .Values.archive.credentialsSecret -}}
{{- fail (printf "archive.credentialsSecret is set and archive.url is %s: a directory takes no credentials" $url) -}}
{{- end -}}
{{- if not (include "valkeeper.isMounted" (dict "directory" $directory "mounts" $mounts "itself" true)) -}}
{{- fail (printf "archive.url is %s: %s must be the mountPath of one of extraVolumeMounts or within it, and not readOnly; all else of the operator's pod is read-only" $url $directory) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.archive.credentialsSecret (not $url) -}}
{{- fail "archive.credentialsSecret is set and archive.url is not: set both, or neither" -}}
{{- end -}}
{{- end -}}
