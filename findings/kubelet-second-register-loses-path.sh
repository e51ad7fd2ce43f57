#!/bin/sh
# A device plugin that registers again on the socket path that kubelet watches loses that path until kubelet restarts.
#
# k8s.io/kubernetes v1.37.2, package pkg/kubelet/cm/devicemanager: kubelet's own device manager, run by itself.
# Up to 1.36 the newer registration replaces the older. In 1.37 the second Register is refused while the stream of the
# first is open, and the refusal also takes the live client off kubelet's table. When the plugin then ends its stream,
# kubelet does not notice: the device stays allocatable, and every later Register on the same path is refused, although
# nothing is connected any longer. Another path is accepted at once.
#
# Output seen:
#   first Register on a.sock: accepted
#   second Register on a.sock, stream open: refused: device plugin already connected
#   stream ended: 1 allocatable device
#   third Register on a.sock, nothing connected: refused: device plugin already connected
#   Register on b.sock: accepted
#
# Needs Go and its module proxy, and unshare: the device manager's folder is fixed, so a mount namespace hides the
# machine's. Takes a few minutes the first time. Fails where the behaviour has changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
kubernetes=v1.37.2
staging=v0.37.2

cat > main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/klog/v2"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
	"k8s.io/kubernetes/pkg/kubelet/cm/containermap"
	"k8s.io/kubernetes/pkg/kubelet/cm/devicemanager"
)

const folder = api.DevicePluginPath

type ready struct{}

func (ready) AddSource(string) {}
func (ready) AllReady() bool   { return true }

type plugin struct {
	api.UnimplementedDevicePluginServer
	watched chan struct{}
}

func (p *plugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

func (p *plugin) ListAndWatch(_ *api.Empty, stream api.DevicePlugin_ListAndWatchServer) error {
	if err := stream.Send(&api.ListAndWatchResponse{Devices: []*api.Device{{ID: "d", Health: "Healthy"}}}); err != nil {
		return err
	}
	p.watched <- struct{}{}
	<-stream.Context().Done()
	return nil
}

func serve(path string) (*grpc.Server, *plugin) {
	os.Remove(path)
	listener, err := net.Listen("unix", path)
	check(err)
	server, served := grpc.NewServer(), &plugin{watched: make(chan struct{}, 8)}
	api.RegisterDevicePluginServer(server, served)
	go server.Serve(listener)
	return server, served
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}

func register(endpoint string) string {
	connection, err := grpc.NewClient("unix:"+api.KubeletSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	request := &api.RegisterRequest{Version: "v1beta1", Endpoint: endpoint, ResourceName: "example.com/d"}
	if _, err := api.NewRegistrationClient(connection).Register(ctx, request); err != nil {
		if strings.Contains(err.Error(), "already connected") {
			return "refused: device plugin already connected"
		}
		return "refused: " + err.Error()
	}
	return "accepted"
}

func main() {
	logger := klog.Background()
	manager, err := devicemanager.NewManagerImpl(logger, nil, nil)
	check(err)
	none := func() []*v1.Pod { return nil }
	check(manager.Start(logger, none, ready{}, containermap.NewContainerMap(), sets.New[string]()))
	first, watched := serve(folder + "a.sock")
	fmt.Println("first Register on a.sock:", register("a.sock"))
	<-watched.watched
	fmt.Println("second Register on a.sock, stream open:", register("a.sock"))
	first.Stop()
	time.Sleep(3 * time.Second)
	_, allocatable, _ := manager.GetCapacity(logger)
	devices := allocatable["example.com/d"]
	fmt.Printf("stream ended: %d allocatable device\n", devices.Value())
	serve(folder + "a.sock")
	fmt.Println("third Register on a.sock, nothing connected:", register("a.sock"))
	serve(folder + "b.sock")
	fmt.Println("Register on b.sock:", register("b.sock"))
}
GO

# The staging modules of Kubernetes are required at v0.0.0 by itself: name the released ones.
source=$(go mod download -json "k8s.io/kubernetes@$kubernetes" | sed -n 's/^[[:space:]]*"Dir": "\(.*\)",*$/\1/p')
go_line=$(sed -n '/^go /p' "$source/go.mod")
{
    printf 'module finding\n\n%s\n\nrequire k8s.io/kubernetes %s\n\nreplace (\n' "$go_line" "$kubernetes"
    sed -n 's/^[[:space:]]*\(k8s.io\/[a-z-]*\) v0\.0\.0\( \/\/ indirect\)*$/\1/p' "$source/go.mod" | sort -u |
        while read -r module; do printf '\t%s => %s %s\n' "$module" "$module" "$staging"; done
    printf ')\n'
} > go.mod
GOFLAGS=-mod=mod go build -o finding . 2> build.log || { cat build.log >&2; exit 2; }

unshare --user --map-root-user --mount sh -c '
    mount -t tmpfs none /var/lib && mkdir -p /var/lib/kubelet/device-plugins && exec ./finding' 2> klog.log | tee seen
cat > expected <<'TEXT'
first Register on a.sock: accepted
second Register on a.sock, stream open: refused: device plugin already connected
stream ended: 1 allocatable device
third Register on a.sock, nothing connected: refused: device plugin already connected
Register on b.sock: accepted
TEXT
diff expected seen > /dev/null || { echo "the behaviour has changed" >&2; exit 1; }
