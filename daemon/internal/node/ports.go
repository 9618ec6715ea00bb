package node

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"

	ma "github.com/multiformats/go-multiaddr"

	"github.com/lloom/lloom-sidecar/daemon/internal/fault"
)

// ErrPortBusy means that another process has one of the host addresses.
var ErrPortBusy = errors.New("the port is in use by another process")

// checkPorts binds every host address with a stated port once, without port
// sharing, and closes it again.
//
// libp2p binds with SO_REUSEPORT, so a second daemon of the same user would get
// the same port and half of the connections; and it starts as soon as one of
// several addresses works, so a busy port would only show as a log line.
func checkPorts(addrs []ma.Multiaddr) error {
	var done []string
	for _, a := range addrs {
		network, address := socketOf(a)
		if network == "" || slices.Contains(done, network+address) {
			continue
		}
		done = append(done, network+address)
		if err := tryBind(network, address); err != nil {
			what := "host address (-hostAddrs) " + a.String()
			switch {
			case errors.Is(err, syscall.EADDRINUSE):
				return fault.New(what, ErrPortBusy, "stop it or pass another port")
			case errors.Is(err, syscall.EADDRNOTAVAIL):
				return fault.New(what, errors.New("this machine has no such address"), "pass an address of its own or 0.0.0.0")
			case errors.Is(err, syscall.EACCES):
				return fault.New(what, errors.New("not permitted to bind it"), "pass a port above 1023")
			case errors.Is(err, syscall.EAFNOSUPPORT):
				return fault.New(what, errors.New("this machine does not have that address family"), "leave the address out")
			default:
				return fault.New(what, errnoOf(err), "pass another address")
			}
		}
	}
	return nil
}

// socketOf is the network and address that Go's net package would bind for a,
// empty if a starts otherwise than IP, then TCP or UDP.
func socketOf(a ma.Multiaddr) (network, address string) {
	parts := a
	if len(parts) < 2 {
		return "", ""
	}
	version := ""
	switch parts[0].Protocol().Code {
	case ma.P_IP4:
		version = "4"
	case ma.P_IP6:
		version = "6"
	default:
		return "", ""
	}
	switch parts[1].Protocol().Code {
	case ma.P_TCP:
		network = "tcp" + version
	case ma.P_UDP:
		network = "udp" + version
	default:
		return "", ""
	}
	if parts[1].Value() == "0" {
		return "", ""
	}
	return network, net.JoinHostPort(parts[0].Value(), parts[1].Value())
}

func tryBind(network, address string) error {
	if strings.HasPrefix(network, "udp") {
		c, err := net.ListenPacket(network, address)
		if err != nil {
			return err
		}
		return c.Close()
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	return l.Close()
}

// checkListening compares what was asked for with what the host listens on.
func checkListening(asked, have []ma.Multiaddr) error {
	var missing []string
	for _, a := range asked {
		if !slices.ContainsFunc(have, func(h ma.Multiaddr) bool { return sameShape(a, h) }) {
			missing = append(missing, a.String())
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fault.New("host address (-hostAddrs) "+strings.Join(missing, ","),
		errors.New("it could not be listened on"),
		"pass addresses such as /ip4/0.0.0.0/tcp/4001 or /ip4/0.0.0.0/udp/4001/quic-v1")
}

// sameShape is true if have is asked, but for a port 0 that became a real one
// and for what a transport appends (certificate hashes).
func sameShape(asked, have ma.Multiaddr) bool {
	if len(have) < len(asked) {
		return false
	}
	for i := range asked {
		if asked[i].Protocol().Code != have[i].Protocol().Code {
			return false
		}
		code := asked[i].Protocol().Code
		if (code == ma.P_TCP || code == ma.P_UDP) && asked[i].Value() == "0" {
			continue
		}
		if asked[i].Value() != have[i].Value() {
			return false
		}
	}
	return true
}

// errnoOf drops the operation and the address that net errors repeat.
func errnoOf(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return fmt.Errorf("%w", errno)
	}
	return err
}
