// Bringing image archives into the container runtimes of both nodes, and making the operator's image.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

func verbLoad(c *cluster, args []string) error {
	if len(args) == 0 {
		return errors.New("usage: cluster load IMAGE.tar...")
	}
	if !c.isUp() {
		return errors.New("the cluster is not up; `cluster up` makes one")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	return c.load(ctx, args)
}

func (c *cluster) isUp() bool {
	_, err := os.Stat(c.path("env"))
	return err == nil
}

// loadDefaults brings in the images that the wrapper built, and the operator's if it was made before.
func (c *cluster) loadDefaults(ctx context.Context) error {
	archives := strings.FieldsFunc(os.Getenv("VALKEEPER_CLUSTER_IMAGES"), func(r rune) bool { return r == ':' })
	if _, err := os.Stat(c.operatorArchive()); err == nil {
		archives = append(archives, c.operatorArchive())
	}
	for _, n := range c.Nodes {
		err := c.waitFor(ctx, "containerd of "+n.Name, func(ctx context.Context) error {
			return exec.CommandContext(ctx, "ctr", "-a", n.Socket, "version").Run()
		})
		if err != nil {
			return err
		}
	}
	return c.load(ctx, archives)
}

// load imports archives into both nodes at the same time.
func (c *cluster) load(ctx context.Context, archives []string) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, n := range c.Nodes {
		group.Go(func() error {
			for _, archive := range archives {
				command := exec.CommandContext(ctx, "ctr", "-a", n.Socket, "-n", "k8s.io", "images", "import", archive)
				if out, err := command.CombinedOutput(); err != nil {
					return fmt.Errorf("load %s into %s: %w: %s", archive, n.Name, err, out)
				}
			}
			return nil
		})
	}
	return group.Wait()
}

func (c *cluster) operatorArchive() string { return filepath.Join(c.Cache, "operator-"+c.ID+".tar") }

// verbImageOperator makes an image of static binaries, and loads it if the cluster is up; else the next `up` does.
func verbImageOperator(c *cluster, args []string) error {
	if len(args) == 0 {
		return errors.New("usage: cluster image-operator STATIC_BINARY [STATIC_BINARY...]; the first is the entry point")
	}
	var files []layerFile
	for _, path := range args {
		binary, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files = append(files, layerFile{name: filepath.Base(path), mode: 0o755, data: binary})
	}
	layer, err := tarLayer(append(files, []layerFile{
		{name: "etc/passwd", mode: 0o644, data: []byte("root:x:0:0:root:/:/sbin/nologin\nvalkeeper:x:65532:65532::/:/sbin/nologin\n")},
		{name: "etc/group", mode: 0o644, data: []byte("root:x:0:\nvalkeeper:x:65532:\n")},
		{name: "tmp/", mode: 0o1777},
	}...))
	if err != nil {
		return err
	}
	image := image{names: []string{operatorImage}, archive: c.operatorArchive(), layers: [][]byte{layer}}
	image.config.User = "65532:65532"
	image.config.Entrypoint = []string{"/" + filepath.Base(args[0])}
	image.config.WorkingDir = "/"
	if err := image.write(); err != nil {
		return err
	}
	fmt.Println(operatorImage + " is in " + c.operatorArchive())
	if !c.isUp() {
		fmt.Println("the next `cluster up` loads it")
		return nil
	}
	return verbLoad(c, []string{c.operatorArchive()})
}
