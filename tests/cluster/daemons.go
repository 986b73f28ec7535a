// The command lines and configuration files of every daemon of the cluster.
package main

import (
	"bytes"
	"embed"
	"os"
	"path/filepath"
	"text/template"
)

//go:embed config
var configFiles embed.FS

// cniBin is where Debian and most others put the network plug-ins.
const cniBin = "/usr/lib/cni"

// configData is what the templates below config/ can use.
type configData struct {
	*cluster
	Node                                                                      node
	PauseImage, CNIBin, DNSServiceIP, ClusterDomain, PodRange, ControlPlaneIP string
}

// writeConfig fills one template into a file.
func (c *cluster) writeConfig(name string, n node, file string) error {
	text, err := configFiles.ReadFile("config/" + name)
	if err != nil {
		return err
	}
	parsed, err := template.New(name).Parse(string(text))
	if err != nil {
		return err
	}
	var out bytes.Buffer
	data := configData{cluster: c, Node: n, PauseImage: pauseImage, CNIBin: cniBin, DNSServiceIP: dnsServiceIP,
		ClusterDomain: clusterDomain, PodRange: podCIDR, ControlPlaneIP: controlPlaneIP}
	if err := parsed.Execute(&out, data); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, out.Bytes(), 0o644)
}

// writeConfigs writes the configuration files of all daemons.
func (c *cluster) writeConfigs() error {
	files := []struct {
		name, file string
		node       node
	}{
		{name: "Corefile.tmpl", file: c.path("Corefile")},
		{name: "audit.yaml", file: c.path("audit.yaml")},
	}
	for _, n := range c.Nodes {
		for from, to := range map[string]string{
			"containerd.toml.tmpl": "containerd.toml",
			"cni.conflist.tmpl":    "cni/10-ptp.conflist",
			"kubelet.yaml.tmpl":    "kubelet.yaml",
			"kube-proxy.yaml.tmpl": "kube-proxy.yaml",
		} {
			files = append(files, struct {
				name, file string
				node       node
			}{from, filepath.Join(n.Dir, to), n})
		}
	}
	for _, f := range files {
		if err := c.writeConfig(f.name, f.node, f.file); err != nil {
			return err
		}
	}
	return nil
}

// storeDaemons are what everything else needs: etcd, the API server, and a container runtime for each node.
func (c *cluster) storeDaemons() []daemon {
	daemons := []daemon{
		{"etcd", c.NetNS, []string{c.Self, "etcd", c.path("etcd")}},
		c.apiServer(),
	}
	for _, n := range c.Nodes {
		daemons = append(daemons, daemon{n.Name + "-containerd", n.NetNS,
			[]string{"containerd", "--config", filepath.Join(n.Dir, "containerd.toml")}})
	}
	return daemons
}

// clientDaemons are those that talk to the API server; started before it answers they would only wait and retry.
func (c *cluster) clientDaemons() []daemon {
	kubeconfigs := func(user string) []string {
		file := c.kubeconfig(user)
		return []string{"--kubeconfig=" + file, "--authentication-kubeconfig=" + file,
			"--authorization-kubeconfig=" + file, "--leader-elect=false", "--bind-address=127.0.0.1"}
	}
	daemons := []daemon{
		{"kube-controller-manager", c.NetNS, append([]string{c.Self, "kube-controller-manager",
			"--service-account-private-key-file=" + c.pki("sa.key"),
			"--root-ca-file=" + c.pki("ca.crt"),
			"--cluster-signing-cert-file=" + c.pki("ca.crt"),
			"--cluster-signing-key-file=" + c.pki("ca.key"),
			"--requestheader-client-ca-file=" + c.pki("front-proxy-ca.crt"),
			"--flex-volume-plugin-dir=" + c.path("volume-plugins"),
			// At the default of 20 requests a second its controllers take five seconds to start.
			"--kube-api-qps=200", "--kube-api-burst=400",
			"--use-service-account-credentials=true"}, kubeconfigs("controller-manager")...)},
		{"kube-scheduler", c.NetNS, append([]string{c.Self, "kube-scheduler"}, kubeconfigs("scheduler")...)},
		{"coredns", c.NetNS, []string{filepath.Join(c.Bin, "coredns"), "-conf", c.path("Corefile")}},
		{"provisioner", c.NetNS, []string{c.Self, "provisioner", c.kubeconfig("provisioner"), c.State}},
	}
	for _, n := range c.Nodes {
		daemons = append(daemons,
			daemon{n.Name + "-kubelet", n.NetNS, []string{c.Self, "kubelet",
				"--config=" + filepath.Join(n.Dir, "kubelet.yaml"),
				"--kubeconfig=" + c.kubeconfig(n.Name),
				"--hostname-override=" + n.Name,
				"--node-ip=" + n.IP,
				"--root-dir=" + filepath.Join(n.Dir, "kubelet"),
				"--cert-dir=" + filepath.Join(n.Dir, "kubelet-pki"),
				"--node-labels=topology.kubernetes.io/zone=" + n.Zone + ",topology.kubernetes.io/region=local"}},
			daemon{n.Name + "-kube-proxy", n.NetNS, []string{c.Self, "kube-proxy",
				"--config=" + filepath.Join(n.Dir, "kube-proxy.yaml")}})
	}
	return daemons
}

func (c *cluster) apiServer() daemon {
	return daemon{"kube-apiserver", c.NetNS, []string{c.Self, "kube-apiserver",
		"--etcd-servers=http://127.0.0.1:2379",
		"--bind-address=" + controlPlaneIP,
		"--advertise-address=" + controlPlaneIP,
		"--secure-port=6443",
		"--service-cluster-ip-range=" + serviceCIDR,
		"--cert-dir=" + c.path("pki"),
		"--client-ca-file=" + c.pki("ca.crt"),
		"--tls-cert-file=" + c.pki("apiserver.crt"),
		"--tls-private-key-file=" + c.pki("apiserver.key"),
		"--service-account-key-file=" + c.pki("sa.pub"),
		"--service-account-signing-key-file=" + c.pki("sa.key"),
		"--service-account-issuer=https://kubernetes.default.svc." + clusterDomain,
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true",
		"--kubelet-client-certificate=" + c.pki("apiserver-kubelet.crt"),
		"--kubelet-client-key=" + c.pki("apiserver-kubelet.key"),
		"--kubelet-certificate-authority=" + c.pki("ca.crt"),
		"--kubelet-preferred-address-types=InternalIP",
		"--requestheader-client-ca-file=" + c.pki("front-proxy-ca.crt"),
		"--requestheader-allowed-names=front-proxy-client",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file=" + c.pki("front-proxy.crt"),
		"--proxy-client-key-file=" + c.pki("front-proxy.key"),
		"--audit-policy-file=" + c.path("audit.yaml"),
		"--audit-log-path=" + c.auditLog(),
	}}
}
