// The programs this binary can become. Each runs as a process of its own, because signal handlers, feature gates and
// metric registries are global to a process.
package main

import (
	"context"
	"os"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// components maps a verb to the program it turns this process into.
var components = map[string]func(args []string) int{
	"etcd":                    runEtcd,
	"provisioner":             runProvisioner,
	"kube-apiserver":          runCobra(func() *cobra.Command { return apiserver.NewAPIServerCommand() }),
	"kube-controller-manager": runCobra(func() *cobra.Command { return controllermanager.NewControllerManagerCommand() }),
	"kube-scheduler":          runCobra(func() *cobra.Command { return scheduler.NewSchedulerCommand() }),
	"kube-proxy":              runCobra(func() *cobra.Command { return proxy.NewProxyCommand() }),
	"kubelet": runCobra(func() *cobra.Command {
		// It sets up its own signal handling, which may happen once only in a process.
		return kubelet.NewKubeletCommand(context.Background())
	}),
}

// runCobra runs a command of Kubernetes as if it were the whole program.
func runCobra(build func() *cobra.Command) func(args []string) int {
	return func(args []string) int {
		// Some of them parse os.Args themselves (the kubelet does), so the verb must not be seen there as an argument.
		os.Args = append([]string{os.Args[1]}, args...)
		command := build()
		command.SetArgs(args)
		return cli.Run(command)
	}
}

// runKubectl is kubectl on the arguments of this process, which are already in the shape kubectl expects.
func runKubectl() int {
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		// Prints the error as kubectl does and ends the process.
		kubectlutil.CheckErr(err)
	}
	return 0
}
