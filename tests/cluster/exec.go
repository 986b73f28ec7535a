// `exec`, `kubectl` and `helm`: running a program of the host inside the cluster's network.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// insideVariable marks the environment of programs started by `exec`.
const insideVariable = "VALKEEPER_INSIDE"

func verbKubectl(c *cluster, args []string) error {
	return c.become(append([]string{filepath.Join(c.Bin, "kubectl")}, args...))
}

func verbHelm(c *cluster, args []string) error {
	return c.become(append([]string{filepath.Join(c.Bin, "helm")}, args...))
}

func verbExec(c *cluster, args []string) error {
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		return errors.New("usage: cluster exec -- COMMAND [ARG...]")
	}
	return c.become(args)
}

// become replaces this process by a program in the control plane's network namespace, with the names of the cluster
// resolvable and our kubectl and helm first in PATH.
func (c *cluster) become(args []string) error {
	if _, err := os.Stat(netnsPath(c.NetNS)); err != nil {
		return errors.New("the cluster is not up; `cluster up` makes one")
	}
	if err := os.Setenv("PATH", c.Bin+":"+os.Getenv("PATH")); err != nil {
		return err
	}
	program, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	// The program takes over this thread with the namespaces it has by then; the other threads end.
	runtime.LockOSThread()
	if err := enterNetNS(netnsPath(c.NetNS)); err != nil {
		return err
	}
	if err := c.useClusterNames(); err != nil {
		fmt.Fprintln(os.Stderr, "cluster: names of the cluster will not resolve:", err)
	}
	return unix.Exec(program, args, c.insideEnvironment())
}

// useClusterNames puts a resolv.conf for the cluster over that of the host, in a mount namespace of this process only.
func (c *cluster) useClusterNames() error {
	if os.Getenv(insideVariable) != "" {
		return nil
	}
	file := c.path("resolv.conf")
	// CoreDNS itself rather than its Service, which would need kube-proxy of the first node.
	text := fmt.Sprintf("nameserver %s\nsearch svc.%s %s\noptions ndots:3\n", controlPlaneIP, clusterDomain, clusterDomain)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	// Mounts of the host still arrive here, ours do not arrive at the host.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return err
	}
	return unix.Mount(file, "/etc/resolv.conf", "", unix.MS_BIND, "")
}

// insideEnvironment is that of the caller, with the cluster's names and without proxies, which are out of reach.
func (c *cluster) insideEnvironment() []string {
	names := map[string]bool{insideVariable: true}
	own := append(c.environment(), insideVariable+"=1")
	for _, line := range own {
		names[line[:strings.IndexByte(line, '=')]] = true
	}
	for _, name := range []string{"http_proxy", "https_proxy", "all_proxy", "no_proxy"} {
		names[name], names[strings.ToUpper(name)] = true, true
	}
	for _, line := range os.Environ() {
		if name, _, _ := strings.Cut(line, "="); !names[name] {
			own = append(own, line)
		}
	}
	return own
}
