#!/bin/sh
# The scheduler of Kubernetes 1.36 loses the counters of a device that a constraint refuses: a claim that fits stays pending.
#
# k8s.io/dynamic-resource-allocation v0.36.2 and v0.37.2, package structured: the allocator of kube-scheduler, by itself,
# with DRAPartitionableDevices on (the default from 1.36 on). A claim asks for a CPU device and a GPU with the same value
# of one attribute (`matchAttribute`). There are CPUs on node 0 and on node 1, tried in that order, and one GPU on node 1
# that draws on a counter set, as every device with partitions does. The GPU is tried beside the CPUs of node 0, and the
# constraint refuses it. 1.36 has taken its counters by then and does not give them back before the next try: beside the
# CPUs of node 1 there are none left, and nothing is allocated. Without counters the same claim is allocated. 1.37 gives
# them back.
#
# Output seen:
#   v0.36.2: without counters: numa1 gpu1; with counters: nothing
#   v0.37.2: without counters: numa1 gpu1; with counters: numa1 gpu1
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

const driver, numa = "driver.example.com", "example.com/numa"

type classes struct{ one *api.DeviceClass }

func (c classes) List() ([]*api.DeviceClass, error)    { return []*api.DeviceClass{c.one}, nil }
func (c classes) Get(string) (*api.DeviceClass, error) { return c.one, nil }

func slice(name, pool string, of int64) *api.ResourceSlice {
	node := "node"
	spec := api.ResourceSliceSpec{Driver: driver, NodeName: &node, Pool: api.ResourcePool{Name: pool, ResourceSliceCount: of}}
	return &api.ResourceSlice{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
}

func device(name, kind string, node int64) api.Device {
	return api.Device{Name: name, Attributes: map[api.QualifiedName]api.DeviceAttribute{
		numa: {IntValue: &node}, "kind": {StringValue: &kind},
	}}
}

func request(kind string) api.DeviceRequest {
	expression := fmt.Sprintf("device.attributes[%q].kind == %q", driver, kind)
	return api.DeviceRequest{Name: kind, Exactly: &api.ExactDeviceRequest{
		DeviceClassName: "class", AllocationMode: api.DeviceAllocationModeExactCount, Count: 1,
		Selectors: []api.DeviceSelector{{CEL: &api.CELDeviceSelector{Expression: expression}}},
	}}
}

func allocated(counted bool) string {
	class := &api.DeviceClass{ObjectMeta: metav1.ObjectMeta{Name: "class"}}
	cpus, gpus, sets := slice("cpus", "cpus", 1), slice("gpus", "gpus", 2), slice("sets", "gpus", 2)
	cpus.Spec.Devices = []api.Device{device("numa0", "cpu", 0), device("numa1", "cpu", 1)}
	gpu := device("gpu1", "gpu", 1)
	one := map[string]api.Counter{"slices": {Value: resource.MustParse("1")}}
	sets.Spec.SharedCounters = []api.CounterSet{{Name: "gpu1", Counters: one}}
	if counted {
		gpu.ConsumesCounters = []api.DeviceCounterConsumption{{CounterSet: "gpu1", Counters: one}}
	}
	gpus.Spec.Devices = []api.Device{gpu}

	claim := &api.ResourceClaim{ObjectMeta: metav1.ObjectMeta{Name: "claim", Namespace: "default", UID: "uid"}}
	claim.Spec.Devices.Requests = []api.DeviceRequest{request("cpu"), request("gpu")}
	match := api.FullyQualifiedName(numa)
	claim.Spec.Devices.Constraints = []api.DeviceConstraint{{MatchAttribute: &match}}

	ctx := context.Background()
	features := structured.Features{PartitionableDevices: true}
	allocator, err := structured.NewAllocator(ctx, features, structured.AllocatedState{}, classes{class},
		[]*api.ResourceSlice{cpus, gpus, sets}, cel.NewCache(10, cel.Features{}))
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
	fmt.Printf("without counters: %s; with counters: %s\n", allocated(false), allocated(true))
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
[ "$old" = "without counters: numa1 gpu1; with counters: nothing" ]
[ "$new" = "without counters: numa1 gpu1; with counters: numa1 gpu1" ]
