// Keys, certificates and kubeconfig files of a new cluster.
package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	pem  []byte
}

// identity is a certificate to be made: a server when it has hosts, else a client.
type identity struct {
	file   string
	name   string
	groups []string
	hosts  []string
}

func newAuthority(name string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := certificateTemplate(pkix.Name{CommonName: name})
	template.IsCA = true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = nil
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{cert: cert, key: key, pem: pemBlock("CERTIFICATE", der)}, nil
}

func certificateTemplate(subject pkix.Name) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      subject,
		// An hour back, for clocks that are set while the cluster runs.
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().AddDate(1, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
}

// issue makes a key and a certificate for it, both as PEM.
func (a *authority) issue(id identity) (cert, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := certificateTemplate(pkix.Name{CommonName: id.name, Organization: id.groups})
	for _, host := range id.hosts {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, private.Public(), a.key)
	if err != nil {
		return nil, nil, err
	}
	keyPEM, err := pemKey(private)
	return pemBlock("CERTIFICATE", der), keyPEM, err
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func pemKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pemBlock("PRIVATE KEY", der), nil
}

// pki is the file of that name in the folder of keys and certificates.
func (c *cluster) pki(name string) string { return c.path("pki", name) }

// writePKI makes every key, certificate and kubeconfig of the cluster.
func (c *cluster) writePKI() error {
	for _, dir := range []string{c.path("pki"), c.path("kubeconfig")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	ca, err := c.writeAuthority("ca", "valkeeper-test")
	if err != nil {
		return err
	}
	// Requests that the API server passes on to an aggregated API are signed by an authority of their own.
	front, err := c.writeAuthority("front-proxy-ca", "valkeeper-test-front-proxy")
	if err != nil {
		return err
	}
	if err := c.writePair(front, identity{file: "front-proxy", name: "front-proxy-client"}); err != nil {
		return err
	}
	for _, id := range c.serverIdentities() {
		if err := c.writePair(ca, id); err != nil {
			return err
		}
	}
	for _, id := range c.userIdentities() {
		if err := c.writeKubeconfig(ca, id); err != nil {
			return err
		}
	}
	return c.writeServiceAccountKey()
}

func (c *cluster) serverIdentities() []identity {
	ids := []identity{
		{file: "apiserver", name: "kube-apiserver", hosts: []string{
			controlPlaneIP, apiServiceIP, "127.0.0.1", "localhost",
			"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + clusterDomain,
		}},
		{file: "apiserver-kubelet", name: "kube-apiserver-kubelet-client", groups: []string{"system:masters"}},
	}
	for _, n := range c.Nodes {
		ids = append(ids, identity{file: n.Name, name: "system:node:" + n.Name, groups: []string{"system:nodes"},
			hosts: []string{n.IP, n.Name}})
	}
	return ids
}

// userIdentities are those that get a kubeconfig; the file name is the one the component is started with.
func (c *cluster) userIdentities() []identity {
	ids := []identity{
		{file: "admin", name: "admin", groups: []string{"system:masters"}},
		{file: "controller-manager", name: "system:kube-controller-manager"},
		{file: "scheduler", name: "system:kube-scheduler"},
		{file: "proxy", name: "system:kube-proxy"},
		{file: "dns", name: "system:cluster-dns"},
		{file: "provisioner", name: "system:local-provisioner"},
	}
	for _, n := range c.Nodes {
		ids = append(ids, identity{file: n.Name, name: "system:node:" + n.Name, groups: []string{"system:nodes"}})
	}
	return ids
}

func (c *cluster) writeAuthority(file, name string) (*authority, error) {
	ca, err := newAuthority(name)
	if err != nil {
		return nil, err
	}
	key, err := pemKey(ca.key)
	if err != nil {
		return nil, err
	}
	return ca, c.writePEM(file, ca.pem, key)
}

func (c *cluster) writePair(ca *authority, id identity) error {
	cert, key, err := ca.issue(id)
	if err != nil {
		return err
	}
	return c.writePEM(id.file, cert, key)
}

func (c *cluster) writePEM(file string, cert, key []byte) error {
	if err := os.WriteFile(c.pki(file+".crt"), cert, 0o600); err != nil {
		return err
	}
	return os.WriteFile(c.pki(file+".key"), key, 0o600)
}

func (c *cluster) writeServiceAccountKey() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	private, err := pemKey(key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.pki("sa.pub"), pemBlock("PUBLIC KEY", der), 0o600); err != nil {
		return err
	}
	return os.WriteFile(c.pki("sa.key"), private, 0o600)
}

// writeKubeconfig embeds the certificates, so that the file can be copied elsewhere.
func (c *cluster) writeKubeconfig(ca *authority, id identity) error {
	cert, key, err := ca.issue(id)
	if err != nil {
		return fmt.Errorf("certificate for %s: %w", id.name, err)
	}
	config := clientcmdapi.NewConfig()
	config.Clusters["valkeeper-test"] = &clientcmdapi.Cluster{Server: apiServerURL, CertificateAuthorityData: ca.pem}
	config.AuthInfos[id.name] = &clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key}
	config.Contexts["valkeeper-test"] = &clientcmdapi.Context{Cluster: "valkeeper-test", AuthInfo: id.name}
	config.CurrentContext = "valkeeper-test"
	file := c.kubeconfig(id.file)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	return clientcmd.WriteToFile(*config, file)
}
