// The jobs of ../README.md through go-redis or valkey-go.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
)

const (
	poolClients = 1000
	poolPeriod  = 5 * time.Second
	// Longest wait for the first acknowledgements.
	readyMax = 60 * time.Second
)

// client is what the jobs need of a library.
type client interface {
	add(ctx context.Context, key string, number int) error
	addInTransaction(ctx context.Context, key string, number int) error
	publish(ctx context.Context, channel string, number int) error
	push(ctx context.Context, key string, number int) error
	// pop waits up to a second; false if nothing came.
	pop(ctx context.Context, key string) (string, bool, error)
	// subscribe calls back for each message, until the end or an error.
	subscribe(ctx context.Context, channel string, received func(string)) error
}

// log is what one task saw.
type log struct {
	Library string   `json:"library"`
	Job     string   `json:"job"`
	Task    int      `json:"task"`
	Key     *string  `json:"key"`
	Period  int64    `json:"period_ms"`
	Ended   int64    `json:"ended_ms"`
	Acks    [][2]any `json:"acks"`
	Errors  [][2]any `json:"errors"`
	lock    sync.Mutex
}

func (l *log) ack(number int) {
	l.lock.Lock()
	defer l.lock.Unlock()
	l.Acks = append(l.Acks, [2]any{number, time.Now().UnixMilli()})
}

func (l *log) err(err error) {
	l.lock.Lock()
	defer l.lock.Unlock()
	l.Errors = append(l.Errors, [2]any{time.Now().UnixMilli(), kind(err)})
}

func (l *log) begun() bool {
	l.lock.Lock()
	defer l.lock.Unlock()
	return len(l.Acks) > 0
}

func kind(err error) string {
	text := err.Error()
	first, _, _ := strings.Cut(text, " ")
	if len(first) > 2 && strings.ToUpper(first) == first && unicode.IsLetter(rune(first[0])) && first != "EOF" {
		return first
	}
	var timeout net.Error
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	case errors.Is(err, io.EOF):
		return "EOF"
	case strings.Contains(text, "connection refused"):
		return "refused"
	case strings.Contains(text, "connection reset"):
		return "reset"
	case strings.Contains(text, "pool timeout"):
		return "pool-timeout"
	}
	return strings.ReplaceAll(strings.TrimSuffix(first, ":"), " ", "-")
}

type work struct {
	ctx             context.Context
	library, prefix string
	open            func() client
	logs            []*log
}

func (w *work) log(job string, task int, key string, period time.Duration) *log {
	l := &log{Library: w.library, Job: job, Task: task, Period: period.Milliseconds(), Acks: [][2]any{}, Errors: [][2]any{}}
	if key != "" {
		l.Key = &key
	}
	w.logs = append(w.logs, l)
	return l
}

// repeat calls it with a new number for each try, until the end.
func (w *work) repeat(l *log, operation func(number int) error) {
	for number := 1; w.ctx.Err() == nil; number++ {
		if err := operation(number); err == nil {
			l.ack(number)
		} else if w.ctx.Err() == nil {
			l.err(err)
		}
		time.Sleep(time.Duration(l.Period) * time.Millisecond)
	}
}

func (w *work) begin(job string) error {
	switch job {
	case "write", "multi":
		c, tasks := w.open(), map[string]int{"write": 6, "multi": 2}[job]
		operation := map[string]func(context.Context, string, int) error{"write": c.add, "multi": c.addInTransaction}[job]
		for task := range tasks {
			l := w.log(job, task, fmt.Sprintf("%s:%s:{%d}", w.prefix, job, task), 10*time.Millisecond)
			go w.repeat(l, func(number int) error { return operation(w.ctx, *l.Key, number) })
		}
	case "subscriber":
		w.subscriber()
	case "blpop":
		w.blpop()
	case "pool":
		for task := range poolClients {
			c := w.open()
			l := w.log(job, task, fmt.Sprintf("%s:pool:%d", w.prefix, task), poolPeriod)
			go func() {
				// Not all at once.
				time.Sleep(time.Duration(task) * poolPeriod / poolClients)
				w.repeat(l, func(number int) error { return c.add(w.ctx, *l.Key, number) })
			}()
		}
	default:
		return fmt.Errorf("%s: no such job", job)
	}
	return nil
}

func (w *work) subscriber() {
	channel, publisher, c := w.prefix+":channel", w.open(), w.open()
	received := w.log("subscriber", 0, "", 20*time.Millisecond)
	go func() {
		for w.ctx.Err() == nil {
			err := c.subscribe(w.ctx, channel, func(text string) {
				if number, err := strconv.Atoi(text); err == nil {
					received.ack(number)
				}
			})
			if err != nil && w.ctx.Err() == nil {
				received.err(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	published := w.log("publish", 0, "", 20*time.Millisecond)
	go w.repeat(published, func(number int) error { return publisher.publish(w.ctx, channel, number) })
}

func (w *work) blpop() {
	key, c := w.prefix+":list", w.open()
	popped := w.log("blpop", 0, "", 20*time.Millisecond)
	go func() {
		for w.ctx.Err() == nil {
			text, found, err := c.pop(w.ctx, key)
			if number, wrong := strconv.Atoi(text); err == nil && found && wrong == nil {
				popped.ack(number)
			} else if err != nil && w.ctx.Err() == nil {
				popped.err(err)
				time.Sleep(10 * time.Millisecond)
			}
		}
	}()
	pushed := w.log("push", 0, "", 20*time.Millisecond)
	go w.repeat(pushed, func(number int) error { return c.push(w.ctx, key, number) })
}

func (w *work) ready() bool {
	for _, l := range w.logs {
		if !l.begun() {
			return false
		}
	}
	return true
}

func run() error {
	if len(os.Args) != 7 {
		return errors.New("expected LIBRARY TOPOLOGY HOST:PORT SECONDS RUN JOBS")
	}
	library, topology, address, prefix, jobs := os.Args[1], os.Args[2], os.Args[3], os.Args[5], os.Args[6]
	seconds, err := strconv.Atoi(os.Args[4])
	if err != nil {
		return err
	}
	ctx, end := context.WithTimeout(context.Background(), time.Duration(seconds)*time.Second)
	defer end()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		end()
	}()
	open, err := opener(library, topology == "Cluster", address, os.Getenv("VALKEY_PASSWORD"))
	if err != nil {
		return err
	}
	w := &work{ctx: ctx, library: library, prefix: prefix + ":" + library, open: open}
	for _, job := range strings.Split(jobs, ",") {
		if err := w.begin(job); err != nil {
			return err
		}
	}
	for begun := time.Now(); !w.ready() && time.Since(begun) < readyMax && ctx.Err() == nil; {
		time.Sleep(50 * time.Millisecond)
	}
	fmt.Printf("{\"ready\":%t}\n", w.ready())
	<-ctx.Done()
	at := time.Now().UnixMilli()
	out := bufio.NewWriter(os.Stdout)
	lines := json.NewEncoder(out)
	for _, l := range w.logs {
		// Kept: whoever comes late stays out of it.
		l.lock.Lock()
		l.Ended = at
		if err := lines.Encode(l); err != nil {
			return err
		}
	}
	return out.Flush()
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
