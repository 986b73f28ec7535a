// Whether the cluster works, asked from inside its network: `up` waits for it, `status` prints it.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"sort"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// client speaks to the API server as admin from the host, by dialling inside the cluster's network.
func (c *cluster) client() (*kubernetes.Clientset, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.kubeconfig("admin"))
	if err != nil {
		return nil, err
	}
	config.Dial = c.dial
	// A proxy of the caller cannot reach the cluster.
	config.Proxy = func(*http.Request) (*url.URL, error) { return nil, nil }
	return kubernetes.NewForConfig(config)
}

func (c *cluster) checkAPIServer(ctx context.Context) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	return client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
}

func (c *cluster) checkNodes(ctx context.Context) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	list, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	ready := map[string]bool{}
	for _, n := range list.Items {
		for _, condition := range n.Status.Conditions {
			if condition.Type == corev1.NodeReady && condition.Status == corev1.ConditionTrue {
				ready[n.Name] = true
			}
		}
	}
	for _, n := range c.Nodes {
		if !ready[n.Name] {
			return fmt.Errorf("%s is not ready", n.Name)
		}
	}
	return nil
}

// checkDNS asks through the Service, so it covers CoreDNS and kube-proxy of the first node.
func (c *cluster) checkDNS(ctx context.Context) error {
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return c.dial(ctx, network, dnsServiceIP+":53")
	}}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	addresses, err := resolver.LookupHost(ctx, "kubernetes.default.svc."+clusterDomain+".")
	if err != nil {
		return err
	}
	if len(addresses) != 1 || addresses[0] != apiServiceIP {
		return fmt.Errorf("the name of the API server gives %v, not %s", addresses, apiServiceIP)
	}
	return nil
}

// checkServiceAccount makes sure that the first pod a test creates is not refused.
func (c *cluster) checkServiceAccount(ctx context.Context) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	_, err = client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
	return err
}

// health is nil when the cluster came up to its end and all of it still works.
func (c *cluster) health(ctx context.Context) error {
	if _, err := os.Stat(c.path("env")); err != nil {
		return errors.New("it did not come up to its end")
	}
	running := c.running()
	for _, d := range append(c.storeDaemons(), c.clientDaemons()...) {
		if !running[d.name] {
			return fmt.Errorf("%s does not run", d.name)
		}
	}
	for _, check := range []func(context.Context) error{c.checkAPIServer, c.checkNodes, c.checkDNS} {
		if err := check(ctx); err != nil {
			return err
		}
	}
	return nil
}

func verbStatus(c *cluster, _ []string) error {
	if _, err := os.Stat(c.State); err != nil {
		fmt.Println("down")
		return errors.New("there is no cluster; `cluster up` makes one")
	}
	running := c.running()
	var names []string
	for name := range running {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		if running[name] {
			fmt.Printf("%-26s runs as %d\n", name, c.daemonPID(name))
		} else {
			fmt.Printf("%-26s ENDED, see %s\n", name, c.logFile(name))
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := c.health(ctx); err != nil {
		return err
	}
	fmt.Println("healthy: API server, nodes and DNS answer; state in " + c.State)
	return nil
}
