// Daemons of the cluster: starting them in their namespace and groups, and telling later whether they still run.
package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// daemon is one long-running process of the cluster.
type daemon struct {
	name  string
	netns string
	args  []string
}

// joinScript puts the shell, and so the daemon it becomes, into the groups before anything else happens.
const joinScript = `for group in $VALKEEPER_CGROUPS; do echo 0 > "$group/cgroup.procs" || exit 1; done
unset VALKEEPER_CGROUPS
exec nsenter --net="$0" -- "$@"`

// start runs a daemon and notes its process id. The channel tells when it ended while we were still watching.
func (c *cluster) start(d daemon) (<-chan error, error) {
	groups, err := c.daemonCgroups()
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{c.path("log"), c.path("pid")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	logFile, err := os.OpenFile(c.logFile(d.name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	command := exec.Command("sh", append([]string{"-c", joinScript, netnsPath(d.netns)}, d.args...)...)
	command.Dir = c.State
	command.Stdout, command.Stderr = logFile, logFile
	// An environment of its own: a proxy setting of the caller, say, has no place inside the cluster.
	command.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + c.State,
		"VALKEEPER_CGROUPS=" + strings.Join(groups, " "),
	}
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := command.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", d.name, err)
	}
	pid := command.Process.Pid
	note := fmt.Sprintf("%d %s\n", pid, startTime(pid))
	if err := os.WriteFile(c.path("pid", d.name), []byte(note), 0o644); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() {
		err := command.Wait()
		ended <- fmt.Errorf("%s ended (%v), last lines of %s:\n%s", d.name, err, c.logFile(d.name), c.lastLines(d.name))
	}()
	return ended, nil
}

func (c *cluster) logFile(name string) string { return c.path("log", name+".log") }

func (c *cluster) lastLines(name string) string {
	data, _ := os.ReadFile(c.logFile(name))
	lines := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	if len(lines) > 15 {
		lines = lines[len(lines)-15:]
	}
	return string(bytes.Join(lines, []byte("\n")))
}

// running tells for each daemon that was ever started whether it still runs.
func (c *cluster) running() map[string]bool {
	found := map[string]bool{}
	notes, _ := filepath.Glob(c.path("pid", "*"))
	for _, note := range notes {
		found[filepath.Base(note)] = c.daemonPID(filepath.Base(note)) != 0
	}
	return found
}

// daemonPID is the process id of a daemon, 0 if it does not run. The start time guards against a number used anew.
func (c *cluster) daemonPID(name string) int {
	data, err := os.ReadFile(c.path("pid", name))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(data))
	if len(fields) != 2 {
		return 0
	}
	pid, err := strconv.Atoi(fields[0])
	if err != nil || startTime(pid) != fields[1] || isZombie(pid) {
		return 0
	}
	return pid
}

// processStat is what follows the command name in /proc/PID/stat: the state first.
func processStat(pid int) []string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	// The name stands in parentheses and may hold any character.
	return strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
}

func startTime(pid int) string {
	stat := processStat(pid)
	if len(stat) < 20 {
		return "gone"
	}
	return stat[19]
}

// isZombie tells whether a process has ended, collected by its parent or not.
func isZombie(pid int) bool {
	stat := processStat(pid)
	return len(stat) == 0 || stat[0] == "Z" || stat[0] == "X"
}

// parentOf is the parent's process id, 0 if unknown.
func parentOf(pid int) int {
	stat := processStat(pid)
	if len(stat) < 2 {
		return 0
	}
	parent, _ := strconv.Atoi(stat[1])
	return parent
}
