package lifecycle

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestStdoutIsUpstreams(t *testing.T) {
	d := start(t, hostAddrs(loopback))
	want := []string{"Control socket: /unix" + d.socket, "Peer ID: " + d.id.String(), "Peer Addrs:", d.addrs[0].String()}
	eventually(t, startTimeout, "the lines", func() bool { return len(lines(d.stdout.String())) >= len(want) })
	if got := lines(d.stdout.String()); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}

	quiet := start(t, "-q", hostAddrs(loopback))
	quiet.signal(syscall.SIGTERM)
	quiet.exit(startTimeout)
	if out := quiet.stdout.String(); out != "" {
		t.Errorf("-q printed %q", out)
	}
}

func TestControlSocketHasItsMode(t *testing.T) {
	for flag, want := range map[string]os.FileMode{"0600": 0o600, "0660": 0o660} {
		d := start(t, "-controlMode", flag)
		info, err := os.Stat(d.socket)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("mode %v, want %v", info.Mode().Perm(), want)
		}
	}
}

// TestKilledDaemonsSocketIsTakenOver kills a real daemon with SIGKILL, which
// leaves the socket file, and starts the next one on it; a third one, while
// that runs, is refused and harms nothing.
func TestKilledDaemonsSocketIsTakenOver(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "c.sock")
	first := startAt(t, socket)
	first.signal(syscall.SIGKILL)
	first.exit(startTimeout)
	if _, err := os.Lstat(socket); err != nil {
		t.Fatalf("the premise fails, no file is left: %v", err)
	}
	second := startAt(t, socket)
	if second.id == first.id {
		t.Fatal("the first daemon answered")
	}
	third := launch(t, "-listen", "/unix"+socket)
	if status := third.exit(startTimeout); status != exitFailed {
		t.Errorf("status %d", status)
	}
	want := fmt.Sprintf("p2pd: control socket /unix%s is in use by another p2pd; stop it or pass another -listen\n", socket)
	if got := third.stderr.String(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if _, _, err := second.client.Identify(); err != nil {
		t.Errorf("the running daemon was harmed: %v", err)
	}
}

func TestSignalsEndCleanly(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		d := start(t, hostAddrs(loopback, "/ip4/127.0.0.1/udp/0/quic-v1"), "-dhtServer", "-pubsub", "-relayHop")
		connect(t, foreign(t), d)
		began := time.Now()
		d.signal(s)
		if status := d.exit(startTimeout); status != exitOK {
			t.Errorf("%v: status %d", s, status)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("%v: took %s", s, took)
		}
		if _, err := os.Lstat(d.socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%v: the socket is left", s)
		}
		if log := d.stderr.String(); strings.Contains(log, "error accepting") {
			t.Errorf("%v: logs on its way out: %s", s, log)
		}
	}
}

func TestUserSignalStillReports(t *testing.T) {
	d := start(t, "-dhtServer", hostAddrs(loopback))
	eventually(t, startTimeout, "start lines", func() bool { return strings.Contains(d.stdout.String(), "Peer Addrs:") })
	d.signal(syscall.SIGUSR1)
	eventually(t, startTimeout, "the report", func() bool { return strings.Contains(d.stdout.String(), "Connections and streams") })
}

func TestEndOfStdin(t *testing.T) {
	d := start(t, "-exitOnStdinEOF", hostAddrs(loopback))
	if _, err := d.stdin.Write([]byte("ignored\n")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := d.client.Identify(); err != nil {
		t.Fatalf("input must not end it: %v", err)
	}
	d.stdin.Close()
	if status := d.exit(3 * time.Second); status != exitOK {
		t.Errorf("status %d", status)
	}
	if _, err := os.Lstat(d.socket); !errors.Is(err, os.ErrNotExist) {
		t.Error("the socket is left")
	}

	without := start(t)
	without.stdin.Close()
	time.Sleep(200 * time.Millisecond) // nothing happens, which gives no event to wait for
	if _, _, err := without.client.Identify(); err != nil {
		t.Errorf("without the flag it must stay: %v", err)
	}
}

// TestFailuresAreOneLine checks status and sentence of starts that cannot work.
func TestFailuresAreOneLine(t *testing.T) {
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	if err := os.WriteFile(key, []byte("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	busy, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	_, port, _ := net.SplitHostPort(busy.Addr().String())
	taken := start(t, hostAddrs(loopback)) // binds with SO_REUSEPORT
	control := "-listen=/unix" + filepath.Join(dir, "c.sock")

	for name, test := range map[string]struct {
		args   []string
		status int
		line   string
	}{
		"key":       {[]string{control, "-id", key}, exitFailed, "p2pd: key file (-id) " + key + ": not a libp2p-marshalled private key; "},
		"no key":    {[]string{control, "-id", key + "x"}, exitFailed, "p2pd: key file (-id) " + key + "x: no such file or directory; create it with lloom-sidecar init"},
		"port":      {[]string{control, hostAddrs("/ip4/127.0.0.1/tcp/" + port)}, exitFailed, "p2pd: host address (-hostAddrs) /ip4/127.0.0.1/tcp/" + port + ": the port is in use by another process; stop it or pass another port"},
		"p2pd port": {[]string{control, hostAddrs(taken.addrs[0].String())}, exitFailed, "the port is in use by another process"},
		"one of":    {[]string{control, hostAddrs(loopback, "/ip4/127.0.0.1/tcp/"+port)}, exitFailed, "the port is in use by another process"},
		"metrics":   {[]string{control, "-metricsAddr", "127.0.0.1:" + port}, exitFailed, "p2pd: metrics address (-metricsAddr) 127.0.0.1:" + port},
		"multiaddr": {[]string{control, hostAddrs("4001")}, exitUsage, "must begin with /"},
		"folder":    {[]string{"-listen", "/unix" + dir + "/none/c.sock"}, exitFailed, "its folder does not exist; create " + dir + "/none"},
		"usage":     {[]string{"-nonsense"}, exitUsage, "p2pd: command line: flag provided but not defined: -nonsense; see p2pd -help"},
		"plaintext": {[]string{"-plaintext"}, exitUsage, "p2pd: -plaintext: unencrypted connections are not supported; "},
	} {
		t.Run(name, func(t *testing.T) {
			d := launch(t, test.args...)
			if status := d.exit(startTimeout); status != test.status {
				t.Errorf("status %d, want %d", status, test.status)
			}
			if got := d.stderr.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, test.line) || strings.Contains(got, "c2Vj") {
				t.Errorf("got %q, want one line with %q", got, test.line)
			}
		})
	}
	if _, err := os.Lstat(filepath.Join(dir, "c.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Error("a failed start left its socket")
	}
}

func TestHelpAndVersion(t *testing.T) {
	help := launch(t, "-help")
	if status := help.exit(startTimeout); status != exitOK || !strings.Contains(help.stderr.String(), "-exitOnStdinEOF") {
		t.Errorf("help: status %d: %s", status, help.stderr.String())
	}
	v := launch(t, "-version")
	if status := v.exit(startTimeout); status != exitOK || !strings.HasPrefix(v.stdout.String(), "lloom-p2pd ") {
		t.Errorf("version: status %d: %s", status, v.stdout.String())
	}
}
