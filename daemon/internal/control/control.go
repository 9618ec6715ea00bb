// Package control makes a control address ready to be listened on: it refuses
// what another daemon holds, clears what a killed one left behind, and sees to
// it that a unix socket is never open to others, not even for a moment.
package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/lloom/lloom-sidecar/daemon/internal/fault"
)

var (
	// ErrInUse means that a live process answers at the control address.
	ErrInUse = errors.New("control socket is in use by another p2pd")
	// ErrNotSocket means that something other than a socket has the path.
	ErrNotSocket = errors.New("the path exists and is not a socket")
	// ErrNoFolder means that the folder of the socket does not exist.
	ErrNoFolder = errors.New("its folder does not exist")
	// ErrPathTooLong means that the path does not fit into a socket address.
	ErrPathTooLong = errors.New("the path is longer than a socket address can hold")
)

// inUse is the one start failure whose sentence does not follow the form of a
// fault: supervisors and people look for these very words.
type inUse struct{ addr string }

func (e inUse) Error() string {
	return fmt.Sprintf("control socket %s is in use by another p2pd; stop it or pass another -listen", e.addr)
}

func (inUse) Is(target error) bool { return target == ErrInUse }

const (
	// probeTimeout bounds the question whether anybody answers; a live daemon's
	// kernel accepts at once.
	probeTimeout = time.Second
	// lockWait bounds the wait for another daemon that starts in the same
	// folder. The lock only closes a race, so it is not insisted upon.
	lockWait = 5 * time.Second
	// maxPathBytes is sun_path of Linux less its final zero; macOS has four less.
	maxPathBytes = 107
)

// Socket is a control address that Claim found free.
type Socket struct {
	addr ma.Multiaddr
	path string // empty for TCP
	mode fs.FileMode
	lock *os.File
	mine fs.FileInfo
}

// Claim checks addr and removes a socket file that nobody answers on. Bind must
// follow soon: until then the folder is locked against other starting daemons.
//
// The error matches ErrInUse, ErrNotSocket, ErrNoFolder or ErrPathTooLong, or
// is the operating system's.
func Claim(addr ma.Multiaddr, mode fs.FileMode) (*Socket, error) {
	what := "control socket " + addr.String()
	s := &Socket{addr: addr, mode: mode}
	path, err := addr.ValueForProtocol(ma.P_UNIX)
	if err != nil {
		return s, claimTCP(addr, what)
	}
	s.path = path
	if len(path) > maxPathBytes {
		return nil, fault.New(what, fmt.Errorf("%w (%d bytes, at most %d)", ErrPathTooLong, len(path), maxPathBytes), "pass a shorter -listen")
	}
	folder := filepath.Dir(path)
	info, err := os.Stat(folder)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(what, ErrNoFolder, "create "+folder+" (mode 0700) or pass another -listen")
	case err != nil:
		return nil, fault.New(what, cause(err), "pass a -listen in a folder of your own")
	case !info.IsDir():
		return nil, fault.New(what, fmt.Errorf("%s is not a folder", folder), "pass another -listen")
	}
	s.lock = lockFolder(folder)
	if err := clear(path, addr, what); err != nil {
		s.release()
		return nil, err
	}
	return s, nil
}

// claimTCP finds out whether addr can be bound: the library's own message comes
// only after the host has started.
func claimTCP(addr ma.Multiaddr, what string) error {
	l, err := manet.Listen(addr)
	if err == nil {
		return l.Close()
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return inUse{addr.String()}
	}
	return fault.New(what, cause(err), "pass another -listen")
}

// clear removes a stale socket at path.
func clear(path string, addr ma.Multiaddr, what string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fault.New(what, cause(err), "pass a -listen in a folder of your own")
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return fault.New(what, ErrNotSocket, "move "+path+" away or pass another -listen")
	}
	c, err := net.DialTimeout("unix", path, probeTimeout)
	if err == nil {
		c.Close()
		return inUse{addr.String()}
	}
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		// Bound once, listened on by nobody now: what kill -9 leaves.
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, fs.ErrPermission):
		return fault.New(what, errors.New("it belongs to another user"), "pass another -listen")
	default:
		// A full backlog or a time-out is a busy daemon, not a dead one.
		return inUse{addr.String()}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.New(what, fmt.Errorf("a stale socket cannot be removed: %w", cause(err)), "remove "+path+" or pass another -listen")
	}
	return nil
}

// Bind runs listen, which must create the socket, so that the file has the
// asked mode from its first moment: bind applies the process's umask. Nothing
// else in the process may create files meanwhile.
func (s *Socket) Bind(listen func() error) error {
	defer s.release()
	if s.path == "" {
		return listen()
	}
	old := syscall.Umask(int(^s.mode & fs.ModePerm))
	err := listen()
	syscall.Umask(old)
	if err != nil {
		return err
	}
	s.mine, err = os.Lstat(s.path)
	if err != nil {
		return fault.New("control socket "+s.addr.String(), cause(err), "pass another -listen")
	}
	return nil
}

// Remove deletes the socket file if it is still the one that Bind made.
func (s *Socket) Remove() {
	if s.mine == nil {
		return
	}
	if info, err := os.Lstat(s.path); err == nil && os.SameFile(info, s.mine) {
		// A folder that became read-only leaves a stale file, which Claim clears.
		_ = os.Remove(s.path)
	}
}

func (s *Socket) release() {
	if s.lock != nil {
		s.lock.Close()
		s.lock = nil
	}
}

// lockFolder takes an advisory lock on folder, so that of two daemons that
// start at once the second one finds the first one's socket. It is nil where
// that is not possible: the lock narrows a race and is no precondition.
func lockFolder(folder string) *os.File {
	f, err := os.Open(folder)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), lockWait)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return f
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			break
		}
		select {
		case <-tick.C:
			continue
		case <-ctx.Done():
		}
		break
	}
	f.Close()
	return nil
}

// cause drops the operation and the path that os and net errors repeat.
func cause(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}
