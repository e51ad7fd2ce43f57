#!/bin/sh
# The scheduler of Kubernetes 1.36 has the feature gate DRAListTypeAttributes, and never matches an attribute with a list.
#
# k8s.io/kubernetes v1.36.2 and v1.37.2, pkg/scheduler/framework/plugins/dynamicresources. With the gate on, the API server
# of 1.36 stores attributes with several values, the scheduler's selectors can read them, and its allocator can compare
# them: a constraint `matchAttribute` holds where two lists have a value in common. But the scheduler's plugin does not
# pass the gate on to the allocator, which then knows no list: a claim that matches such an attribute stays pending on
# every node, without an error. 1.37 passes it on.
#
# Output seen:
#   v1.36.2: the allocator is asked to compare lists: false
#   v1.37.2: the allocator is asked to compare lists: true
#
# Needs Go and its module proxy. Takes ten minutes the first time. Fails where the behaviour has changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > main.go <<'GO'
package main

import (
	"fmt"

	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/dynamicresources"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/feature"
)

func main() {
	found := dynamicresources.AllocatorFeatures(feature.Features{EnableDRAListTypeAttributes: true})
	fmt.Printf("the allocator is asked to compare lists: %v\n", found.ListTypeAttributes)
}
GO

# k8s.io/kubernetes takes its own libraries from its tree: their published versions stand in for them.
seen() {
    rm -f go.mod go.sum
    go mod init finding >/dev/null 2>&1
    of=$(go mod download -json "k8s.io/kubernetes@v1.$1" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
    go mod edit -require "k8s.io/kubernetes@v1.$1"
    sed -n 's/^[[:space:]]*\(k8s\.io\/[a-z-]*\) v0\.0\.0$/\1/p' "$of" | sort -u | while read -r module; do
        go mod edit -replace "$module=$module@v0.$1"
    done
    GOFLAGS=-mod=mod CGO_ENABLED=0 go run . 2>errors || { cat errors >&2; exit 1; }
}

old=$(seen 36.2)
new=$(seen 37.2)
echo "v1.36.2: $old"
echo "v1.37.2: $new"
[ "$old" = "the allocator is asked to compare lists: false" ]
[ "$new" = "the allocator is asked to compare lists: true" ]
