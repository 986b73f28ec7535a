// Entry point: one binary that is every component of the test cluster and the tool that runs it.
package main

import (
	"fmt"
	"os"
	"path/filepath"
)

// verbs are what a person or a test calls; components (components.go) are what `up` starts.
var verbs = map[string]func(c *cluster, args []string) error{
	"up":             verbUp,
	"down":           verbDown,
	"status":         verbStatus,
	"load":           verbLoad,
	"exec":           verbExec,
	"kubectl":        verbKubectl,
	"helm":           verbHelm,
	"env":            verbEnv,
	"write-image":    verbWriteImage,
	"image-operator": verbImageOperator,
}

func main() {
	// The same file under the name kubectl is kubectl, so that scripts and plug-ins find it in PATH.
	if filepath.Base(os.Args[0]) == "kubectl" {
		os.Exit(runKubectl())
	}
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: cluster VERB [ARG...]; see tests/cluster/README.md")
		os.Exit(2)
	}
	name, args := os.Args[1], os.Args[2:]
	if component, ok := components[name]; ok {
		os.Exit(component(args))
	}
	verb, ok := verbs[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "cluster: unknown verb %q; see tests/cluster/README.md\n", name)
		os.Exit(2)
	}
	c, err := newCluster()
	if err == nil {
		err = verb(c, args)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "cluster %s: %v\n", name, err)
		os.Exit(1)
	}
}
