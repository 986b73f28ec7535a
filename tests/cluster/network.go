// The network of the cluster: one namespace for the control plane, holding a bridge, and one for each node with a leg
// in that bridge. There is no link to the outside, so nothing in the cluster can reach anything but the cluster.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

const bridgeName = "br0"

// createNetwork makes the namespaces, links, addresses and routes.
func (c *cluster) createNetwork() error {
	for _, name := range c.allNetNS() {
		if err := run("ip", "netns", "add", name); err != nil {
			return err
		}
	}
	// Link names cannot meet those of other clusters: both ends are made inside our namespaces.
	control := []string{
		"link set lo up",
		"link add " + bridgeName + " type bridge",
		"addr add " + controlPlaneIP + "/24 dev " + bridgeName,
		"link set " + bridgeName + " up",
	}
	for _, n := range c.Nodes {
		control = append(control,
			fmt.Sprintf("link add %s type veth peer name eth0 netns %s", n.Name, n.NetNS),
			fmt.Sprintf("link set %s master %s", n.Name, bridgeName),
			fmt.Sprintf("link set %s up", n.Name),
			fmt.Sprintf("route add %s via %s", n.PodCIDR, n.IP))
	}
	// The control plane has no kube-proxy: it sends what is for a Service to the first node.
	control = append(control, fmt.Sprintf("route add %s via %s", serviceCIDR, c.Nodes[0].IP))
	if err := ipBatch(c.NetNS, control); err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if err := c.configureNode(n); err != nil {
			return err
		}
	}
	return nil
}

func (c *cluster) configureNode(n node) error {
	batch := []string{"link set lo up", "addr add " + n.IP + "/24 dev eth0", "link set eth0 up"}
	for _, other := range c.Nodes {
		if other.Name != n.Name {
			batch = append(batch, fmt.Sprintf("route add %s via %s", other.PodCIDR, other.IP))
		}
	}
	// A process on the node itself needs some route before kube-proxy gets to rewrite the address of a Service.
	batch = append(batch, fmt.Sprintf("route add %s dev eth0", serviceCIDR))
	if err := ipBatch(n.NetNS, batch); err != nil {
		return err
	}
	return run("nsenter", "--net="+netnsPath(n.NetNS), "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
}

// ipBatch runs lines of ip(8) in one namespace.
func ipBatch(netns string, lines []string) error {
	command := exec.Command("ip", "-n", netns, "-batch", "-")
	command.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("ip -n %s: %w: %s", netns, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// run runs a command and makes its output part of the error.
func run(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// enterNetNS moves the calling thread, which must be locked, into a namespace.
func enterNetNS(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", path, err)
	}
	return nil
}

// dial connects from inside the control plane's namespace: a socket stays in the namespace it was made in, so only the
// thread that makes it has to go there.
func (c *cluster) dial(ctx context.Context, network, address string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		home := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		fd, err := unix.Open(home, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- result{err: err}
			return
		}
		defer unix.Close(fd)
		if err := enterNetNS(netnsPath(c.NetNS)); err != nil {
			done <- result{err: err}
			return
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		// A thread that cannot come back stays locked, and ends with this goroutine.
		if unix.Setns(fd, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

// deleteNetwork removes the namespaces and with them every link, address and route.
func (c *cluster) deleteNetwork() {
	for _, name := range c.allNetNS() {
		if _, err := os.Stat(netnsPath(name)); err == nil {
			// A half-made one is a plain file: unmounting fails, removing the file is all there is to do.
			if run("ip", "netns", "del", name) != nil {
				_ = unix.Unmount(netnsPath(name), unix.MNT_DETACH)
				_ = os.Remove(netnsPath(name))
			}
		}
	}
}
