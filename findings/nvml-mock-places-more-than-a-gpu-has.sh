#!/bin/sh
# The mock of NVIDIA's library that drivers are tested with offers MIG instances at places that together need more memory
# than the GPU has.
#
# github.com/NVIDIA/go-nvml v0.13.4-1, package pkg/nvml/mock/dgxh100: the eight H100 80GB of a DGX, with MIG enabled. A
# placement is a range of memory slices, of which an H100 has eight, and NVIDIA's MIG User Guide has 3g.40gb on four of
# them (at 0 and 4) and 1g.20gb on two (at 0, 2, 4 and 6). In the mock 3g.40gb takes three and 1g.20gb one, at seven
# starts, although the same profile says that only four instances of it exist. A program that
# computes from the mock's placements which instances fit together takes 3g + 3g + 1g and 7 x 1g.20gb for possible.
#
# Output seen:
#   the GPU has 81920 MiB
#   1g.20gb: 4 instances, 7 placements without overlap, 143360 MiB together
#   3g.40gb at 0+3 and 4+3 leave slice 3 to 1g.10gb: 92160 MiB together
#
# Needs Go and its module proxy; no GPU. Takes half a minute the first time. Fails where the behaviour has changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > main.go <<'GO'
package main

import (
	"fmt"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxh100"
)

func check(ret nvml.Return) {
	if ret != nvml.SUCCESS {
		panic(fmt.Sprint("NVML error ", int(ret)))
	}
}

func profile(gpu nvml.Device, id int) (nvml.GpuInstanceProfileInfo, []nvml.GpuInstancePlacement) {
	info, ret := gpu.GetGpuInstanceProfileInfo(id)
	check(ret)
	places, ret := gpu.GetGpuInstancePossiblePlacements(&info)
	check(ret)
	return info, places
}

func main() {
	gpu, ret := dgxh100.New().DeviceGetHandleByIndex(0)
	check(ret)
	memory, ret := gpu.GetMemoryInfo()
	check(ret)
	fmt.Printf("the GPU has %d MiB\n", memory.Total>>20)

	info, places := profile(gpu, nvml.GPU_INSTANCE_PROFILE_1_SLICE_REV2)
	taken, apart := map[uint32]bool{}, 0
	for _, place := range places {
		free := true
		for slice := place.Start; slice < place.Start+place.Size; slice++ {
			free = free && !taken[slice]
		}
		for slice := place.Start; free && slice < place.Start+place.Size; slice++ {
			taken[slice] = true
		}
		if free {
			apart++
		}
	}
	fmt.Printf("1g.20gb: %d instances, %d placements without overlap, %d MiB together\n",
		info.InstanceCount, apart, uint64(apart)*info.MemorySizeMB)

	large, wide := profile(gpu, nvml.GPU_INSTANCE_PROFILE_3_SLICE)
	small, narrow := profile(gpu, nvml.GPU_INSTANCE_PROFILE_1_SLICE)
	for _, one := range narrow {
		if one.Start >= wide[0].Start+wide[0].Size && one.Start+one.Size <= wide[1].Start {
			fmt.Printf("3g.40gb at %d+%d and %d+%d leave slice %d to 1g.10gb: %d MiB together\n",
				wide[0].Start, wide[0].Size, wide[1].Start, wide[1].Size, one.Start,
				2*large.MemorySizeMB+small.MemorySizeMB)
		}
	}
}
GO

cat > expected <<'TEXT'
the GPU has 81920 MiB
1g.20gb: 4 instances, 7 placements without overlap, 143360 MiB together
3g.40gb at 0+3 and 4+3 leave slice 3 to 1g.10gb: 92160 MiB together
TEXT

go mod init finding >/dev/null 2>&1
go get github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxh100@v0.13.4-1 >/dev/null 2>&1
go run . > seen
cat seen
cmp -s seen expected || { echo "the behaviour has changed"; exit 1; }
