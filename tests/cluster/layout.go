// Where everything of one cluster lives: names, addresses and paths. Every name carries an id made from the path of
// the checkout, so that several checkouts on one machine do not meet.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const (
	kubernetesVersion = "v1.36.3"

	// The same inner addresses serve every cluster: each lives in network namespaces of its own without a way out.
	controlPlaneIP = "10.200.0.1"
	apiServerURL   = "https://10.200.0.1:6443"
	bridgeCIDR     = "10.200.0.0/24"
	podCIDR        = "10.201.0.0/16"
	serviceCIDR    = "10.202.0.0/16"
	apiServiceIP   = "10.202.0.1"
	dnsServiceIP   = "10.202.0.10"
	clusterDomain  = "cluster.local"

	pauseImage    = "valkeeper.local/pause:1"
	operatorImage = "valkeeper.local/valkeeper:dev"
)

// node is one of the two machines the cluster pretends to have.
type node struct {
	Name    string
	Zone    string
	IP      string
	PodCIDR string
	Gateway string
	NetNS   string
	Dir     string
	Cgroup  string
	Socket  string
}

// cluster is everything needed to find or make the cluster of one checkout.
type cluster struct {
	ID    string
	State string
	Bin   string
	Cache string
	Self  string
	NetNS string
	Nodes []node
}

func newCluster() (*cluster, error) {
	checkout := os.Getenv("VALKEEPER_CLUSTER_CHECKOUT")
	cache := os.Getenv("VALKEEPER_CLUSTER_CACHE")
	if checkout == "" || cache == "" {
		return nil, errors.New("call it as tests/cluster/cluster, which sets up what this program needs")
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(checkout))
	id := hex.EncodeToString(sum[:4])
	c := &cluster{
		ID: id,
		// Short on purpose: a Unix socket path may have 108 bytes. Not /run, which is often memory.
		State: "/var/lib/valkeeper-" + id,
		Bin:   filepath.Dir(self),
		Cache: cache,
		Self:  self,
		NetNS: fmt.Sprintf("valkeeper-%s-cp", id),
	}
	for i, letter := range []string{"a", "b"} {
		name := "node-" + letter
		dir := filepath.Join(c.State, name)
		c.Nodes = append(c.Nodes, node{
			Name:    name,
			Zone:    "zone-" + letter,
			IP:      fmt.Sprintf("10.200.0.%d", 11+i),
			PodCIDR: fmt.Sprintf("10.201.%d.0/24", 1+i),
			Gateway: fmt.Sprintf("10.201.%d.1", 1+i),
			NetNS:   fmt.Sprintf("valkeeper-%s-%s", id, letter),
			Dir:     dir,
			Cgroup:  fmt.Sprintf("/%s/%s", c.cgroupName(), name),
			Socket:  filepath.Join(dir, "containerd.sock"),
		})
	}
	return c, nil
}

// cgroupName is the group, in every hierarchy, under which all processes of the cluster run.
func (c *cluster) cgroupName() string { return "valkeeper-" + c.ID }

// path joins names to the state directory.
func (c *cluster) path(names ...string) string {
	return filepath.Join(append([]string{c.State}, names...)...)
}

func (c *cluster) kubeconfig(user string) string { return c.path("kubeconfig", user) }

func (c *cluster) auditLog() string { return c.path("audit.log") }

// allNetNS lists the network namespaces: the control plane first, since it holds the bridge.
func (c *cluster) allNetNS() []string {
	names := []string{c.NetNS}
	for _, n := range c.Nodes {
		names = append(names, n.NetNS)
	}
	return names
}

func netnsPath(name string) string { return "/run/netns/" + name }

// environment is what a test needs to know of the cluster, as NAME=value lines.
func (c *cluster) environment() []string {
	var sockets []string
	lines := []string{
		"KUBECONFIG=" + c.kubeconfig("admin"),
		"VALKEEPER_CLUSTER_ID=" + c.ID,
		"VALKEEPER_CLUSTER_STATE=" + c.State,
		"VALKEEPER_CLUSTER_BIN=" + c.Bin,
		"AUDIT_LOG=" + c.auditLog(),
		"NETNS=" + netnsPath(c.NetNS),
	}
	for _, n := range c.Nodes {
		key := strings.ToUpper(strings.ReplaceAll(n.Name, "-", "_"))
		lines = append(lines, "NETNS_"+key+"="+netnsPath(n.NetNS), "CONTAINERD_"+key+"="+n.Socket)
		sockets = append(sockets, n.Socket)
	}
	return append(lines, "CONTAINERD_SOCKETS="+strings.Join(sockets, ":"))
}

func verbEnv(c *cluster, _ []string) error {
	for _, line := range c.environment() {
		fmt.Println("export " + line)
	}
	fmt.Printf("export PATH=%s:\"$PATH\"\n", c.Bin)
	return nil
}
