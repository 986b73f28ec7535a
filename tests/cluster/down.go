// `down`: removes everything a cluster is made of, whatever state it is in, and checks that nothing is left.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// killPatience is how long processes and groups may take to go away.
const killPatience = 20 * time.Second

func verbDown(c *cluster, _ []string) error {
	unlock, err := c.lock()
	if err != nil {
		return err
	}
	defer unlock()
	started := time.Now()
	if err := c.remove(); err != nil {
		return err
	}
	fmt.Printf("down after %.1fs: no process, mount, namespace, control group or file of %s is left\n",
		time.Since(started).Seconds(), c.cgroupName())
	return nil
}

// lock lets one `up` or `down` of this checkout run at a time. The kernel drops it when the process ends.
func (c *cluster) lock() (func(), error) {
	if os.Getenv(insideVariable) != "" {
		return nil, errors.New("not from inside `cluster exec`: the mounts of the host are out of reach there")
	}
	file, err := os.OpenFile(filepath.Join(c.Cache, "lock-"+c.ID), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		fmt.Println("another up or down of this checkout is running: waiting for it")
		if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
			return nil, err
		}
	}
	return func() { file.Close() }, nil
}

// remove takes the cluster away. Nothing is asked to stop by itself: all of its data goes away with it.
func (c *cluster) remove() error {
	// Two things are known only from files that are about to be deleted.
	sockets := c.shimSockets()
	foreign := c.madeByUs()

	problem := c.killCgroups(killPatience)
	c.killNoted()
	c.killGuests()
	for attempt := 0; attempt < 3; attempt++ {
		c.unmountAll()
	}
	c.deleteNetwork()
	c.deleteCgroups(killPatience)
	for _, socket := range sockets {
		_ = os.Remove(socket)
	}
	c.deleteTraces()
	if err := os.RemoveAll(c.State); err != nil {
		problem = errors.Join(problem, err)
	}
	deleteForeign(foreign)
	if left := c.leftovers(); len(left) > 0 {
		return errors.Join(problem, fmt.Errorf("still there:\n  %s", strings.Join(left, "\n  ")))
	}
	return nil
}

// killNoted ends daemons that never got into their control group.
func (c *cluster) killNoted() {
	for name, runs := range c.running() {
		if runs {
			_ = unix.Kill(c.daemonPID(name), unix.SIGKILL)
		}
	}
}

// killGuests ends what was started by `cluster exec` and still runs: its network is about to vanish. The process that
// asked for it, which may be a test runner inside, is spared.
func (c *cluster) killGuests() {
	for _, pid := range c.guests() {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	for i := 0; i < 100 && len(c.guests()) > 0; i++ {
		time.Sleep(20 * time.Millisecond)
	}
}

// guests are the processes in the cluster's network namespaces, without ourselves and our ancestors.
func (c *cluster) guests() []int {
	ours := map[uint64]bool{}
	for _, name := range c.allNetNS() {
		var stat unix.Stat_t
		if unix.Stat(netnsPath(name), &stat) == nil {
			ours[stat.Ino] = true
		}
	}
	spared := map[int]bool{}
	for pid := os.Getpid(); pid > 0 && !spared[pid]; pid = parentOf(pid) {
		spared[pid] = true
	}
	var found []int
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || spared[pid] {
			continue
		}
		var stat unix.Stat_t
		if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &stat) == nil && ours[stat.Ino] && !isZombie(pid) {
			found = append(found, pid)
		}
	}
	return found
}

// mount is one line of the mount table.
type mount struct{ path, kind string }

func readMounts() ([]mount, error) {
	data, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var mounts []mount
	for _, line := range strings.Split(string(data), "\n") {
		if fields := strings.Fields(line); len(fields) >= 3 {
			mounts = append(mounts, mount{unescapeMount(fields[1]), fields[2]})
		}
	}
	return mounts, nil
}

// unescapeMount turns the octal escapes of the mount table back into characters.
func unescapeMount(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}

// ownMounts are those below the state folder, the deepest first.
func (c *cluster) ownMounts() []string {
	mounts, _ := readMounts()
	var own []string
	for _, m := range mounts {
		if strings.HasPrefix(m.path, c.State+"/") {
			own = append(own, m.path)
		}
	}
	sort.Slice(own, func(i, j int) bool { return len(own[i]) > len(own[j]) })
	return own
}

func (c *cluster) unmountAll() {
	for _, path := range c.ownMounts() {
		if unix.Unmount(path, 0) != nil {
			_ = unix.Unmount(path, unix.MNT_DETACH)
		}
	}
}

// shimSockets are the sockets of the shims. containerd keeps them in one folder for the whole machine and they outlive
// a shim that is killed.
func (c *cluster) shimSockets() []string {
	var sockets []string
	for _, n := range c.Nodes {
		notes, _ := filepath.Glob(filepath.Join(n.Dir, "containerd-state/io.containerd.runtime.v2.task/k8s.io/*/address"))
		for _, note := range notes {
			data, _ := os.ReadFile(note)
			if socket, ok := strings.CutPrefix(strings.TrimSpace(string(data)), "unix://"); ok {
				sockets = append(sockets, socket)
			}
		}
	}
	return sockets
}

// deleteTraces removes what the kubelet and the network plug-ins leave in folders of the whole machine.
func (c *cluster) deleteTraces() {
	for _, path := range c.traces() {
		_ = os.Remove(path)
	}
}

func (c *cluster) traces() []string {
	var found []string
	// The plug-ins' notes of each container; those of the loopback do not carry our name, but all name our folders.
	for _, pattern := range []string{"/var/lib/cni/results/*", "/var/lib/cni/cache/results/*"} {
		notes, _ := filepath.Glob(pattern)
		for _, note := range notes {
			if data, err := os.ReadFile(note); err == nil && strings.Contains(string(data), c.State+"/") {
				found = append(found, note)
			}
		}
	}
	links, _ := filepath.Glob("/var/log/containers/*.log")
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, c.State+"/") {
			found = append(found, link)
		}
	}
	return found
}

// foreignPaths are folders of the whole machine that the components insist on; children before parents.
var foreignPaths = []string{
	"/var/lib/kubelet/device-plugins", "/var/lib/kubelet/pki", "/var/lib/kubelet",
	"/var/log/containers", "/var/log/pods",
	"/var/lib/cni/results", "/var/lib/cni/cache/results", "/var/lib/cni/cache", "/var/lib/cni/networks", "/var/lib/cni",
	"/run/containerd/s", "/run/containerd",
}

// noteForeign writes down which of those folders do not exist yet, or came from another cluster of ours.
func (c *cluster) noteForeign() error {
	others := map[string]bool{}
	notes, _ := filepath.Glob("/var/lib/valkeeper-*/made-by-us")
	for _, note := range notes {
		data, _ := os.ReadFile(note)
		for _, path := range strings.Fields(string(data)) {
			others[path] = true
		}
	}
	var ours []string
	for _, path := range foreignPaths {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) || others[path] {
			ours = append(ours, path)
		}
	}
	return os.WriteFile(c.path("made-by-us"), []byte(strings.Join(ours, "\n")+"\n"), 0o644)
}

func (c *cluster) madeByUs() []string {
	data, _ := os.ReadFile(c.path("made-by-us"))
	return strings.Fields(string(data))
}

// deleteForeign removes those folders again unless another cluster of ours still uses them.
func deleteForeign(paths []string) {
	if others, _ := filepath.Glob("/var/lib/valkeeper-*/made-by-us"); len(others) > 0 {
		return
	}
	for _, path := range paths {
		if path == "/var/lib/kubelet/device-plugins" {
			_ = os.RemoveAll(path)
			continue
		}
		// Only when empty: what others put there stays.
		_ = unix.Rmdir(path)
	}
}

// leftovers names what of the cluster is still there.
func (c *cluster) leftovers() []string {
	var left []string
	for pid := range c.cgroupProcesses() {
		command, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		left = append(left, fmt.Sprintf("process %d (%s)", pid, strings.TrimSpace(string(command))))
	}
	for _, path := range c.ownMounts() {
		left = append(left, "mount "+path)
	}
	for _, name := range c.allNetNS() {
		if _, err := os.Lstat(netnsPath(name)); err == nil {
			left = append(left, "network namespace "+name)
		}
	}
	for _, dir := range c.cgroupDirs() {
		left = append(left, "control group "+dir)
	}
	for _, path := range c.traces() {
		left = append(left, "file "+path)
	}
	if _, err := os.Lstat(c.State); err == nil {
		left = append(left, "folder "+c.State)
	}
	sort.Strings(left)
	return left
}
