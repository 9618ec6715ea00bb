// Package lifecycle is the daemon's life as a process: exit statuses, standard
// output, signals and the lifeline on standard input.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/lloom/lloom-sidecar/daemon/internal/config"
	"github.com/lloom/lloom-sidecar/daemon/internal/diagnostics"
	"github.com/lloom/lloom-sidecar/daemon/internal/node"
	"github.com/lloom/lloom-sidecar/daemon/internal/version"
)

// Exit statuses.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// closePatience bounds the farewell to the peers.
const closePatience = time.Second

// Main is the whole program; it returns the exit status.
func Main(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c, err := config.Parse(args, stdin, stderr)
	switch {
	case errors.Is(err, config.ErrHelp):
		return exitOK
	case errors.Is(err, config.ErrVersion):
		fmt.Fprintln(stdout, version.String())
		return exitOK
	case err != nil:
		return fail(stderr, err)
	}

	// Registered before anything starts, so that a signal during the start is
	// not lost and still removes the socket.
	stop := make(chan struct{}, 1)
	end := func() {
		select {
		case stop <- struct{}{}:
		default:
		}
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		end()
	}()
	if c.ExitOnStdinEOF {
		go func() {
			// An error ends the lifeline just as its end does.
			_, _ = io.Copy(io.Discard, stdin)
			end()
		}()
	}

	warn := func(line string) { fmt.Fprintln(stderr, "p2pd: warning: "+strings.Join(strings.Fields(line), " ")) }
	if c.PProf.Enabled {
		addr, err := diagnostics.ServePprof(c.PProf.Port)
		if err != nil {
			return fail(stderr, err)
		}
		fmt.Fprintf(stderr, "p2pd: pprof at http://%s/debug/pprof/\n", addr)
	}
	if c.MetricsAddress != "" {
		if err := diagnostics.ServeMetrics(c.MetricsAddress); err != nil {
			return fail(stderr, err)
		}
	}

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	release := heldSignals()
	n, err := node.Start(ctx, c, warn)
	if err != nil {
		return fail(stderr, err)
	}
	release(signals)
	if !c.Quiet {
		announce(stdout, c, n)
	}
	<-stop
	n.Close(closePatience)
	return exitOK
}

// fail prints err on one line and returns the exit status that fits it.
func fail(stderr io.Writer, err error) int {
	fmt.Fprintln(stderr, "p2pd: "+strings.Join(strings.Fields(err.Error()), " "))
	if errors.Is(err, config.ErrUsage) {
		return exitUsage
	}
	return exitFailed
}

// announce prints the lines that bindings wait for, exactly as upstream does.
func announce(stdout io.Writer, c config.Config, n *node.Node) {
	fmt.Fprintf(stdout, "Control socket: %s\n", n.ControlAddr())
	fmt.Fprintf(stdout, "Peer ID: %s\n", n.ID())
	fmt.Fprintf(stdout, "Peer Addrs:\n")
	for _, a := range n.Addrs() {
		fmt.Fprintf(stdout, "%s\n", a)
	}
	if c.Bootstrap.Enabled && len(c.Bootstrap.Peers) > 0 {
		fmt.Fprintf(stdout, "Bootstrap peers:\n")
		for _, p := range c.Bootstrap.Peers {
			fmt.Fprintf(stdout, "%s\n", p)
		}
	}
}

// heldSignals prepares to take SIGINT and SIGTERM back from the daemon, and
// returns the function that does it once the daemon has started.
//
// The daemon's constructor starts a goroutine that registers for SIGUSR1,
// SIGINT and SIGTERM, in this order and in one call; on the latter two it ends
// the process with status 128 + n after closing a host that may take long. It
// cannot be told not to. So SIGUSR1 is ignored first: when it is no longer, the
// goroutine has registered, and resetting the two leaves only this package's
// handler (and the daemon's report on SIGUSR1).
func heldSignals() func(ours chan<- os.Signal) {
	signal.Ignore(syscall.SIGUSR1)
	return func(ours chan<- os.Signal) {
		for signal.Ignored(syscall.SIGUSR1) {
			time.Sleep(time.Millisecond)
		}
		signal.Reset(syscall.SIGINT, syscall.SIGTERM)
		signal.Notify(ours, syscall.SIGINT, syscall.SIGTERM)
	}
}
