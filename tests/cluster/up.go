// `up`: from nothing to a cluster that schedules pods and answers names.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// upPatience is far more than the ten to fifteen seconds it takes: other work may share the machine.
const upPatience = 3 * time.Minute

func verbUp(c *cluster, _ []string) error {
	unlock, err := c.lock()
	if err != nil {
		return err
	}
	defer unlock()
	started := time.Now()
	if _, err := os.Stat(c.State); err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		problem := c.health(ctx)
		cancel()
		if problem == nil {
			fmt.Println("the cluster is up already")
			return nil
		}
		fmt.Printf("what is there does not work (%v): starting anew\n", problem)
	}
	// Also without a state folder something may be left, after a half-finished `down` say.
	if err := c.remove(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), upPatience)
	defer cancel()
	if err := c.create(ctx, started); err != nil {
		return fmt.Errorf("%w\nlogs are in %s; `cluster down` removes what was started", err, c.path("log"))
	}
	fmt.Printf("up after %.1fs: nodes %s; try: tests/cluster/cluster kubectl get nodes\n",
		time.Since(started).Seconds(), strings.Join(c.nodeNames(), ", "))
	return nil
}

// create builds the cluster. Steps that do not depend on each other run at the same time.
func (c *cluster) create(ctx context.Context, started time.Time) error {
	say := func(what string) { fmt.Printf("%5.1fs  %s\n", time.Since(started).Seconds(), what) }
	if err := c.prepare(); err != nil {
		return err
	}
	say("network, certificates and configuration are ready")
	watch, ctx := newWatcher(ctx)
	if err := c.startAll(watch, c.storeDaemons()); err != nil {
		return err
	}
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := c.loadDefaults(groupCtx); err != nil {
			return err
		}
		say("images are loaded into both nodes")
		return nil
	})
	group.Go(func() error {
		if err := c.waitFor(groupCtx, "the API server", c.checkAPIServer); err != nil {
			return err
		}
		say("the API server answers")
		if err := c.startAll(watch, c.clientDaemons()); err != nil {
			return err
		}
		return c.applyAddons(groupCtx)
	})
	if err := group.Wait(); err != nil {
		return watch.explain(err)
	}
	for _, check := range []struct {
		what string
		run  func(context.Context) error
	}{
		{"both nodes", c.checkNodes},
		{"cluster DNS", c.checkDNS},
		{"the default service account", c.checkServiceAccount},
	} {
		if err := c.waitFor(ctx, check.what, check.run); err != nil {
			return watch.explain(err)
		}
		say(check.what + ": ready")
	}
	// For the wrapper, which then need not build anything to talk to this cluster.
	if err := os.Symlink(c.Self, c.path("program")); err != nil {
		return err
	}
	// The last thing written: its presence means that `up` came to its end.
	return os.WriteFile(c.path("env"), []byte(strings.Join(c.environment(), "\n")+"\n"), 0o644)
}

func (c *cluster) prepare() error {
	if err := os.MkdirAll(c.State, 0o755); err != nil {
		return err
	}
	for _, step := range []func() error{c.noteForeign, c.writePKI, c.writeConfigs, c.createCgroups, c.createNetwork} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// startAll starts daemons, and has the watcher end the waiting when one of them does.
func (c *cluster) startAll(watch *watcher, daemons []daemon) error {
	for _, d := range daemons {
		ended, err := c.start(d)
		if err != nil {
			return err
		}
		watch.add(ended)
	}
	return nil
}

// watcher stops a context with the reason when a daemon ends while the cluster comes up.
type watcher struct {
	cancel context.CancelCauseFunc
	ctx    context.Context
}

func newWatcher(parent context.Context) (*watcher, context.Context) {
	ctx, cancel := context.WithCancelCause(parent)
	return &watcher{cancel, ctx}, ctx
}

func (w *watcher) add(ended <-chan error) {
	go func() { w.cancel(<-ended) }()
}

// explain prefers the daemon that ended over whatever failed because of it.
func (w *watcher) explain(err error) error {
	if cause := context.Cause(w.ctx); cause != nil && cause != w.ctx.Err() {
		return cause
	}
	return err
}

// waitFor tries a check until it passes, and names its last complaint when time is up.
func (c *cluster) waitFor(ctx context.Context, what string, check func(context.Context) error) error {
	for {
		once, cancel := context.WithTimeout(ctx, 3*time.Second)
		err := check(once)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// applyAddons leaves the objects to kubectl, which knows all their kinds.
func (c *cluster) applyAddons(ctx context.Context) error {
	manifest, err := configFiles.ReadFile("config/addons.yaml")
	if err != nil {
		return err
	}
	command := exec.CommandContext(ctx, "nsenter", "--net="+netnsPath(c.NetNS), "--",
		filepath.Join(c.Bin, "kubectl"), "--kubeconfig="+c.kubeconfig("admin"), "create", "--validate=false", "-f", "-")
	command.Stdin = strings.NewReader(string(manifest))
	command.Env = []string{"HOME=" + c.State, "PATH=" + os.Getenv("PATH")}
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("create what belongs to the cluster: %w: %s", err, out)
	}
	return nil
}

func (c *cluster) nodeNames() []string {
	var names []string
	for _, n := range c.Nodes {
		names = append(names, n.Name)
	}
	return names
}
