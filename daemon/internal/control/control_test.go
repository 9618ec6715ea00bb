package control

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	ma "github.com/multiformats/go-multiaddr"
)

func unixAddr(path string) ma.Multiaddr { return ma.StringCast("/unix" + path) }

// stale leaves what a killed daemon leaves: a bound path that nobody listens on.
func stale(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Fatal(err)
	}
}

func TestClaimRefuses(t *testing.T) {
	dir := t.TempDir()
	live := filepath.Join(dir, "live")
	l, err := net.Listen("unix", live)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	_, port, _ := net.SplitHostPort(tcp.Addr().String())

	for name, test := range map[string]struct {
		addr string
		want error
	}{
		"live":   {"/unix" + live, ErrInUse},
		"tcp":    {"/ip4/127.0.0.1/tcp/" + port, ErrInUse},
		"file":   {"/unix" + file, ErrNotSocket},
		"folder": {"/unix" + filepath.Join(dir, "none", "s"), ErrNoFolder},
		"long":   {"/unix" + filepath.Join(dir, strings.Repeat("x", 120)), ErrPathTooLong},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Claim(ma.StringCast(test.addr), 0o600)
			if !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
			if strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "; ") {
				t.Errorf("not one line with a remedy: %q", err)
			}
		})
	}
	if body, _ := os.ReadFile(file); string(body) != "precious" {
		t.Error("the file was touched")
	}
	if c, err := net.Dial("unix", live); err != nil {
		t.Errorf("the live socket was removed: %v", err)
	} else {
		c.Close()
	}
}

func TestClaimClearsStaleAndBindSetsTheModeAtOnce(t *testing.T) {
	for _, mode := range []os.FileMode{0o600, 0o660} {
		path := filepath.Join(t.TempDir(), "s")
		stale(t, path)
		s, err := Claim(unixAddr(path), mode)
		if err != nil {
			t.Fatal(err)
		}
		var l net.Listener
		if err := s.Bind(func() error {
			if l, err = net.Listen("unix", path); err != nil {
				return err
			}
			// Seen from within: there is no moment with another mode.
			info, err := os.Lstat(path)
			if err != nil {
				return err
			}
			if info.Mode().Perm() != mode {
				t.Errorf("mode %v while binding, want %v", info.Mode().Perm(), mode)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		s.Remove()
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("still there: %v", err)
		}
		l.Close()
	}
}

func TestRemoveSparesAnotherDaemonsSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	s, err := Claim(unixAddr(path), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Bind(func() error { stale(t, path); return nil }); err != nil {
		t.Fatal(err)
	}
	// The successor is bound before the old file goes, so that no inode is reused.
	next := path + ".next"
	l, err := net.Listen("unix", next)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
	s.Remove()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the successor's socket is gone: %v", err)
	}
}

// TestOneOfManyClaimsWins starts daemons at once on one stale socket.
func TestOneOfManyClaimsWins(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stale(t, path)
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		won  int
		lost int
	)
	for range 8 {
		wg.Go(func() {
			s, err := Claim(unixAddr(path), 0o600)
			if err == nil {
				err = s.Bind(func() error {
					l, err := net.Listen("unix", path)
					if err == nil {
						t.Cleanup(func() { l.Close() })
					}
					return err
				})
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				won++
			case errors.Is(err, ErrInUse):
				lost++
			default:
				t.Errorf("unexpected: %v", err)
			}
		})
	}
	wg.Wait()
	if won != 1 || lost != 7 {
		t.Errorf("%d won, %d lost", won, lost)
	}
}
