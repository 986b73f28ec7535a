// Control groups: all processes of the cluster run under one group, which is how `down` finds every one of them.
// Works on the old layout (one mount for each controller) and the new one.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// hierarchies are the mount points of control groups below /sys/fs/cgroup.
func hierarchies() ([]string, error) {
	mounts, err := readMounts()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, m := range mounts {
		if (m.kind == "cgroup" || m.kind == "cgroup2") && strings.HasPrefix(m.path, "/sys/fs/cgroup") {
			found = append(found, m.path)
		}
	}
	if len(found) == 0 {
		return nil, errors.New("no control groups are mounted below /sys/fs/cgroup")
	}
	return found, nil
}

// createCgroups makes the group of the cluster, and in it one for the daemons and one for each node's pods.
func (c *cluster) createCgroups() error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		top := filepath.Join(root, c.cgroupName())
		groups := []string{top, filepath.Join(top, "system")}
		for _, n := range c.Nodes {
			groups = append(groups, filepath.Join(root, n.Cgroup))
		}
		for _, group := range groups {
			if err := os.MkdirAll(group, 0o755); err != nil {
				return err
			}
			if err := inheritCpuset(group); err != nil {
				return err
			}
			// New layout: a controller reaches the children only if the parent says so.
			delegateControllers(filepath.Dir(group))
		}
	}
	return nil
}

// inheritCpuset fills the processors and memory nodes of a group, which start empty on the old layout and would
// keep every process out.
func inheritCpuset(group string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		own, err := os.ReadFile(filepath.Join(group, name))
		if err != nil || len(strings.TrimSpace(string(own))) > 0 {
			continue
		}
		// On the new layout empty means "as the parent" and needs nothing.
		if _, err := os.Stat(filepath.Join(group, "cgroup.controllers")); err == nil {
			continue
		}
		parent, err := os.ReadFile(filepath.Join(filepath.Dir(group), name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(group, name), parent, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// delegateControllers lets the children of a group of the new layout use all its controllers. One that cannot be
// passed on is left out: the kubelet says so if it needs it.
func delegateControllers(group string) {
	controllers, err := os.ReadFile(filepath.Join(group, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, name := range strings.Fields(string(controllers)) {
		_ = os.WriteFile(filepath.Join(group, "cgroup.subtree_control"), []byte("+"+name), 0o644)
	}
}

// daemonCgroups are the groups a daemon of the cluster is put into.
func (c *cluster) daemonCgroups() ([]string, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	for i, root := range roots {
		roots[i] = filepath.Join(root, c.cgroupName(), "system")
	}
	return roots, nil
}

// cgroupDirs lists the groups of the cluster that exist, children before parents.
func (c *cluster) cgroupDirs() []string {
	roots, _ := hierarchies()
	var dirs []string
	for _, root := range roots {
		_ = filepath.WalkDir(filepath.Join(root, c.cgroupName()), func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
	}
	for i, j := 0, len(dirs)-1; i < j; i, j = i+1, j-1 {
		dirs[i], dirs[j] = dirs[j], dirs[i]
	}
	return dirs
}

// cgroupProcesses are the processes in the groups of the cluster.
func (c *cluster) cgroupProcesses() map[int]bool {
	found := map[int]bool{}
	for _, dir := range c.cgroupDirs() {
		data, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		for _, field := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil && !isZombie(pid) {
				found[pid] = true
			}
		}
	}
	return found
}

// killCgroups ends every process of the cluster, again and again until no new one turns up.
func (c *cluster) killCgroups(patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for {
		pids := c.cgroupProcesses()
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes do not end: %v", len(pids), pids)
		}
		c.thaw()
		for pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// thaw lets frozen processes run on, since a frozen one does not end when killed on the old layout.
func (c *cluster) thaw() {
	for _, dir := range c.cgroupDirs() {
		state := filepath.Join(dir, "freezer.state")
		if data, err := os.ReadFile(state); err == nil && !strings.HasPrefix(string(data), "THAWED") {
			_ = os.WriteFile(state, []byte("THAWED"), 0o644)
		}
	}
}

// deleteCgroups removes the groups. The kernel lets go of one a moment after its last process.
func (c *cluster) deleteCgroups(patience time.Duration) {
	deadline := time.Now().Add(patience)
	for {
		dirs := c.cgroupDirs()
		if len(dirs) == 0 || time.Now().After(deadline) {
			return
		}
		busy := false
		for _, dir := range dirs {
			busy = unix.Rmdir(dir) != nil || busy
		}
		if busy {
			time.Sleep(20 * time.Millisecond)
		}
	}
}
