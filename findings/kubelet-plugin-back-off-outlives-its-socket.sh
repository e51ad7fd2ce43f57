#!/bin/sh
# A plugin that kubelet could not register is left alone for up to two minutes, however often it makes its socket anew.
#
# k8s.io/kubernetes v1.37.2, package pkg/kubelet/pluginmanager: kubelet's own plugin manager, run by itself. It finds the
# registration sockets of DRA and CSI drivers in a folder. Each failed attempt doubles the pause before the next one, from
# half a second to 2 min 2 s, and the pause belongs to the path: a socket that was removed and made anew there is seen and
# still not asked. A socket with another name in the same folder is asked at once.
#
# Output seen:
#   a.sock, made anew after its first failure: asked again within 3 s
#   a.sock, made anew after its fifth failure: not asked again for 7 s
#   b.sock, made at that moment: asked within 3 s
#
# Needs Go and its module proxy. Takes a few minutes the first time. Fails where the behaviour has changed.
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
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"k8s.io/client-go/tools/record"
	api "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
	"k8s.io/kubernetes/pkg/kubelet/pluginmanager"
)

type ready struct{}

func (ready) AddSource(string) {}
func (ready) AllReady() bool   { return true }

// refusing is a handler that takes no plugin.
type refusing struct{}

func (refusing) ValidatePlugin(context.Context, string, string, []string) error {
	return errors.New("refused on purpose")
}
func (refusing) RegisterPlugin(context.Context, string, string, []string, *time.Duration) error { return nil }
func (refusing) DeRegisterPlugin(context.Context, string, string)                               {}

type plugin struct {
	api.UnimplementedRegistrationServer
	asked, failed chan struct{}
}

func (p *plugin) GetInfo(context.Context, *api.InfoRequest) (*api.PluginInfo, error) {
	p.asked <- struct{}{}
	return &api.PluginInfo{Type: api.DRAPlugin, Name: "driver.example.com", Endpoint: "/dra.sock", SupportedVersions: []string{"v1.DRAPlugin"}}, nil
}

func (p *plugin) NotifyRegistrationStatus(context.Context, *api.RegistrationStatus) (*api.RegistrationStatusResponse, error) {
	p.failed <- struct{}{}
	return &api.RegistrationStatusResponse{}, nil
}

func serve(path string) (*grpc.Server, *plugin) {
	listener, err := net.Listen("unix", path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	server, served := grpc.NewServer(), &plugin{asked: make(chan struct{}, 8), failed: make(chan struct{}, 8)}
	api.RegisterRegistrationServer(server, served)
	go server.Serve(listener)
	return server, served
}

// within waits for an event; whether it came in time.
func within(event chan struct{}, seconds int) bool {
	select {
	case <-event:
		return true
	case <-time.After(time.Duration(seconds) * time.Second):
		return false
	}
}

func say(what string, asked bool, seconds int) {
	words := map[bool]string{true: "asked again within %d s\n", false: "not asked again for %d s\n"}
	fmt.Printf(what+words[asked], seconds)
}

func main() {
	folder, err := os.MkdirTemp("", "plugins")
	if err != nil {
		os.Exit(2)
	}
	defer os.RemoveAll(folder)
	manager := pluginmanager.NewPluginManager(folder, record.NewFakeRecorder(100))
	manager.AddHandler(api.DRAPlugin, refusing{})
	go manager.Run(context.Background(), ready{}, make(chan struct{}))
	time.Sleep(2 * time.Second)

	a, b := filepath.Join(folder, "a.sock"), filepath.Join(folder, "b.sock")
	server, served := serve(a)
	for failures := 1; failures <= 5; failures++ {
		if !within(served.asked, 30) || !within(served.failed, 30) {
			fmt.Println("a.sock was not tried")
			os.Exit(1)
		}
		time.Sleep(100 * time.Millisecond)
		server.Stop() // removes the file
		server, served = serve(a)
		if failures == 1 {
			asked := within(served.asked, 3)
			say("a.sock, made anew after its first failure: ", asked, 3)
			if asked {
				served.asked <- struct{}{}
			}
		}
	}
	say("a.sock, made anew after its fifth failure: ", within(served.asked, 7), 7)
	_, other := serve(b)
	fmt.Println("b.sock, made at that moment:", map[bool]string{true: "asked within 3 s", false: "not asked for 3 s"}[within(other.asked, 3)])
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

./finding 2> klog.log | tee seen
cat > expected <<'TEXT'
a.sock, made anew after its first failure: asked again within 3 s
a.sock, made anew after its fifth failure: not asked again for 7 s
b.sock, made at that moment: asked within 3 s
TEXT
diff expected seen > /dev/null || { echo "the behaviour has changed" >&2; exit 1; }
