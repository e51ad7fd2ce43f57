#!/bin/sh
# The scheduler of Kubernetes 1.36 takes the counters of two drivers' pools for one set, where the pools have one name.
#
# k8s.io/dynamic-resource-allocation v0.36.2 and v0.37.2, package structured: the allocator of kube-scheduler, by itself,
# with DRAPartitionableDevices on (the default from 1.36 on). Two drivers on a node name their pool after the node, as
# dra-example-driver 0.4.0 does. Each has one device that draws on a counter set of its own pool. 1.36 keeps
# the counters by the pool's name alone, without the driver's: where the counter sets have one name too ("card-0"), a
# claim for a device of each driver is never allocated, although both are free. 1.37 keeps them by driver and pool.
#
# Output seen:
#   v0.36.2: pools of two names: a b; pools of one name: nothing
#   v0.37.2: pools of two names: a b; pools of one name: a b
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
	"strings"

	v1 "k8s.io/api/core/v1"
	api "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/dynamic-resource-allocation/cel"
	"k8s.io/dynamic-resource-allocation/structured"
)

type classes struct{ one *api.DeviceClass }

func (c classes) List() ([]*api.DeviceClass, error)    { return []*api.DeviceClass{c.one}, nil }
func (c classes) Get(string) (*api.DeviceClass, error) { return c.one, nil }

// pool is that of one driver: a device, and the counter set that it draws on.
func pool(driver, name, device string) []*api.ResourceSlice {
	node := "node"
	one := map[string]api.Counter{"slices": {Value: resource.MustParse("1")}}
	spec := api.ResourceSliceSpec{Driver: driver, NodeName: &node, Pool: api.ResourcePool{Name: name, ResourceSliceCount: 2}}
	sets := &api.ResourceSlice{ObjectMeta: metav1.ObjectMeta{Name: driver + "-sets"}, Spec: spec}
	sets.Spec.SharedCounters = []api.CounterSet{{Name: "card-0", Counters: one}}
	devices := &api.ResourceSlice{ObjectMeta: metav1.ObjectMeta{Name: driver + "-devices"}, Spec: spec}
	draws := []api.DeviceCounterConsumption{{CounterSet: "card-0", Counters: one}}
	devices.Spec.Devices = []api.Device{{Name: device, ConsumesCounters: draws}}
	return []*api.ResourceSlice{sets, devices}
}

func request(name, driver string) api.DeviceRequest {
	return api.DeviceRequest{Name: name, Exactly: &api.ExactDeviceRequest{
		DeviceClassName: "class", AllocationMode: api.DeviceAllocationModeExactCount, Count: 1,
		Selectors: []api.DeviceSelector{{CEL: &api.CELDeviceSelector{Expression: fmt.Sprintf("device.driver == %q", driver)}}},
	}}
}

func allocated(first, second string) string {
	class := &api.DeviceClass{ObjectMeta: metav1.ObjectMeta{Name: "class"}}
	slices := append(pool("a.example.com", first, "a"), pool("b.example.com", second, "b")...)
	claim := &api.ResourceClaim{ObjectMeta: metav1.ObjectMeta{Name: "claim", Namespace: "default", UID: "uid"}}
	claim.Spec.Devices.Requests = []api.DeviceRequest{request("a", "a.example.com"), request("b", "b.example.com")}

	ctx := context.Background()
	features := structured.Features{PartitionableDevices: true}
	allocator, err := structured.NewAllocator(ctx, features, structured.AllocatedState{}, classes{class}, slices,
		cel.NewCache(10, cel.Features{}))
	if err != nil {
		panic(err)
	}
	found, err := allocator.Allocate(ctx, &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}}, []*api.ResourceClaim{claim})
	if err != nil {
		panic(err)
	}
	if len(found) == 0 {
		return "nothing"
	}
	names := []string{}
	for _, result := range found[0].Devices.Results {
		names = append(names, result.Device)
	}
	return strings.Join(names, " ")
}

func main() {
	fmt.Printf("pools of two names: %s; pools of one name: %s\n", allocated("node-a", "node-b"), allocated("node", "node"))
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
[ "$old" = "pools of two names: a b; pools of one name: nothing" ]
[ "$new" = "pools of two names: a b; pools of one name: a b" ]
