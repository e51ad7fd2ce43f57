#!/bin/sh
# The scheduler of Kubernetes 1.37 takes the requests out of a claim's configuration that names all of its requests.
#
# k8s.io/dynamic-resource-allocation v0.36.2 and v0.37.2, package structured: the allocator of kube-scheduler, by itself.
# A claim has an opaque configuration with `requests: [cpus]`. Up to 1.36 the copy in status.allocation.devices.config
# names the request too. From 1.37 on the copy names none if the configuration covers every request of the claim. A driver
# reads only the copy: it cannot tell a configuration that names its request from one that is for all, and a claim with one
# request never has names there. One that names some of several requests keeps them.
#
# Output seen:
#   v0.36.2: one request: [cpus]; two requests: [cpus]
#   v0.37.2: one request: []; two requests: [cpus]
#
# Needs Go and its module proxy. Takes a few minutes the first time. Fails where the behaviour has changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > main.go <<'GO'
package main

import (
	"context"
	"fmt"

	v1 "k8s.io/api/core/v1"
	api "k8s.io/api/resource/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/dynamic-resource-allocation/cel"
	"k8s.io/dynamic-resource-allocation/structured"
)

type classes struct{ one *api.DeviceClass }

func (c classes) List() ([]*api.DeviceClass, error)            { return []*api.DeviceClass{c.one}, nil }
func (c classes) Get(string) (*api.DeviceClass, error)         { return c.one, nil }

func named(names ...string) []string {
	class := &api.DeviceClass{ObjectMeta: metav1.ObjectMeta{Name: "class"}}
	node, pool := "node", api.ResourcePool{Name: "pool", ResourceSliceCount: 1}
	slice := &api.ResourceSlice{Spec: api.ResourceSliceSpec{Driver: "driver.example.com", NodeName: &node, Pool: pool}}
	claim := &api.ResourceClaim{ObjectMeta: metav1.ObjectMeta{Name: "claim", Namespace: "default", UID: "uid"}}
	for _, name := range names {
		slice.Spec.Devices = append(slice.Spec.Devices, api.Device{Name: name})
		exactly := &api.ExactDeviceRequest{DeviceClassName: "class", AllocationMode: api.DeviceAllocationModeExactCount, Count: 1}
		claim.Spec.Devices.Requests = append(claim.Spec.Devices.Requests, api.DeviceRequest{Name: name, Exactly: exactly})
	}
	opaque := &api.OpaqueDeviceConfiguration{Driver: "driver.example.com", Parameters: runtime.RawExtension{Raw: []byte("{}")}}
	config := api.DeviceClaimConfiguration{Requests: []string{"cpus"}}
	config.Opaque = opaque
	claim.Spec.Devices.Config = []api.DeviceClaimConfiguration{config}

	ctx := context.Background()
	allocator, err := structured.NewAllocator(ctx, structured.Features{}, structured.AllocatedState{}, classes{class},
		[]*api.ResourceSlice{slice}, cel.NewCache(10, cel.Features{}))
	if err != nil {
		panic(err)
	}
	found, err := allocator.Allocate(ctx, &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, []*api.ResourceClaim{claim})
	if err != nil || len(found) != 1 || len(found[0].Devices.Config) != 1 {
		panic(fmt.Sprint(found, err))
	}
	return found[0].Devices.Config[0].Requests
}

func main() {
	fmt.Printf("one request: %v; two requests: %v\n", named("cpus"), named("cpus", "nic"))
}
GO

seen() {
    rm -f go.mod go.sum
    go mod init finding >/dev/null 2>&1
    for module in api apimachinery client-go component-base component-helpers apiserver kubelet dynamic-resource-allocation; do
        go mod edit -require "k8s.io/$module@$1"
    done
    GOFLAGS=-mod=mod go run . 2>errors || { cat errors >&2; exit 1; }
}

old=$(seen v0.36.2)
new=$(seen v0.37.2)
echo "v0.36.2: $old"
echo "v0.37.2: $new"
[ "$old" = "one request: [cpus]; two requests: [cpus]" ]
[ "$new" = "one request: []; two requests: [cpus]" ]
