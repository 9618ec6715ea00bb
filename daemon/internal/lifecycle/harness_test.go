package lifecycle

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p-daemon/p2pclient"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	ma "github.com/multiformats/go-multiaddr"
)

// childVariable makes this test binary be the daemon: the tests run the whole
// program as a process of its own, which can be killed.
const childVariable = "P2PD_TEST_CHILD"

// startTimeout bounds the wait for a daemon on a busy machine.
const startTimeout = 20 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		os.Exit(Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// daemon is one child process.
type daemon struct {
	t      *testing.T
	cmd    *exec.Cmd
	socket string
	stdin  io.WriteCloser
	stdout lockedBuffer
	stderr lockedBuffer
	done   chan struct{}
	client *p2pclient.Client
	id     peer.ID
	addrs  []ma.Multiaddr
}

// lockedBuffer is written by the process's copying goroutine while tests read.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// launch starts the program without waiting for it.
func launch(t *testing.T, args ...string) *daemon {
	t.Helper()
	d := &daemon{t: t, done: make(chan struct{})}
	d.cmd = exec.Command(os.Args[0], args...)
	d.cmd.Env = append(os.Environ(), childVariable+"=1")
	d.cmd.Stdout, d.cmd.Stderr = &d.stdout, &d.stderr
	var err error
	if d.stdin, err = d.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = d.cmd.Wait()
		close(d.done)
	}()
	t.Cleanup(func() {
		_ = d.cmd.Process.Kill()
		<-d.done
		if t.Failed() {
			t.Logf("p2pd %v: stderr:\n%s", args, d.stderr.String())
		}
	})
	return d
}

// start runs a daemon on a fresh control socket and waits until it answers.
func start(t *testing.T, args ...string) *daemon {
	t.Helper()
	return startAt(t, filepath.Join(t.TempDir(), "c.sock"), args...)
}

func startAt(t *testing.T, socket string, args ...string) *daemon {
	t.Helper()
	d := launch(t, append([]string{"-listen", "/unix" + socket}, args...)...)
	d.socket = socket
	client, err := p2pclient.NewClient(ma.StringCast("/unix"+socket), ma.StringCast("/unix"+filepath.Join(t.TempDir(), "h.sock")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	d.client = client
	eventually(t, startTimeout, "the daemon answers", func() bool {
		select {
		case <-d.done:
			t.Fatalf("p2pd ended: %s", d.stderr.String())
		default:
		}
		d.id, d.addrs, err = client.Identify()
		return err == nil
	})
	return d
}

// info is where the daemon can be dialled.
func (d *daemon) info() peer.AddrInfo { return peer.AddrInfo{ID: d.id, Addrs: d.addrs} }

// exit waits for the end and returns the status.
func (d *daemon) exit(limit time.Duration) int {
	d.t.Helper()
	select {
	case <-d.done:
	case <-time.After(limit):
		d.t.Fatalf("p2pd still runs after %s: %s", limit, d.stderr.String())
	}
	return d.cmd.ProcessState.ExitCode()
}

// signal sends s.
func (d *daemon) signal(s syscall.Signal) {
	d.t.Helper()
	if err := d.cmd.Process.Signal(s); err != nil {
		d.t.Fatal(err)
	}
}

// eventually polls until ok, because another process gives no event to wait for.
func eventually(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", limit, what)
		}
	}
}

// foreign is a plain go-libp2p host without limits of its own.
func foreign(t *testing.T, opts ...libp2p.Option) host.Host {
	t.Helper()
	m, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(rcmgr.InfiniteLimits))
	if err != nil {
		t.Fatal(err)
	}
	h, err := libp2p.New(append([]libp2p.Option{
		libp2p.ResourceManager(m), libp2p.DisableMetrics(), libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// connect dials d from h.
func connect(t *testing.T, h host.Host, d *daemon) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	if err := h.Connect(ctx, d.info()); err != nil {
		t.Fatal(err)
	}
}

// lines are the non-empty lines of s.
func lines(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == '\n' })
}

const loopback = "/ip4/127.0.0.1/tcp/0"

func hostAddrs(addrs ...string) string { return "-hostAddrs=" + strings.Join(addrs, ",") }

func relayAddr(d *daemon) string { return fmt.Sprintf("%s/p2p/%s", d.addrs[0], d.id) }
