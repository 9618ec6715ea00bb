// Package node starts the standard daemon with the options that a
// configuration asks for.
package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"time"

	"go.uber.org/fx"

	"github.com/libp2p/go-libp2p"
	p2pd "github.com/libp2p/go-libp2p-daemon"
	ps "github.com/libp2p/go-libp2p-pubsub"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	tls "github.com/libp2p/go-libp2p/p2p/security/tls"
	quic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	ws "github.com/libp2p/go-libp2p/p2p/transport/websocket"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/lloom/lloom-sidecar/daemon/internal/config"
	"github.com/lloom/lloom-sidecar/daemon/internal/control"
	"github.com/lloom/lloom-sidecar/daemon/internal/fault"
	"github.com/lloom/lloom-sidecar/daemon/internal/mdns"
	"github.com/lloom/lloom-sidecar/daemon/internal/version"
)

// Pace of the attempts to reach a bootstrap peer.
const (
	bootstrapFirstRetry = 2 * time.Second
	bootstrapMaxRetry   = time.Minute
)

// Node is a running daemon.
type Node struct {
	daemon  *p2pd.Daemon
	host    host.Host
	socket  *control.Socket
	closers []io.Closer
}

// Start runs the daemon that c describes until ctx ends or Close is called.
// warn is given single lines about what an operator should look at.
//
// Every error is one line for the operator; those of the control socket match
// the errors of package control, the others ErrKeyFormat, ErrPSKFormat or
// ErrPortBusy where they apply.
func Start(ctx context.Context, c config.Config, warn func(string)) (*Node, error) {
	n := &Node{}
	opts, err := n.options(c, warn)
	if err != nil {
		return nil, err
	}
	if !c.NoListen {
		if err := checkPorts(c.HostAddresses); err != nil {
			return nil, err
		}
	}
	n.socket, err = control.Claim(c.ListenAddr.Multiaddr, fs.FileMode(c.ControlMode))
	if err != nil {
		return nil, err
	}
	// The daemon's constructor starts the host and then binds the control
	// socket, and there is no hook between them.
	err = n.socket.Bind(func() error {
		n.daemon, err = p2pd.NewDaemon(ctx, c.ListenAddr.Multiaddr, c.DHT.Mode, opts...)
		return err
	})
	if err != nil {
		return nil, startFault(c, err)
	}
	if err := n.startServices(ctx, c, warn); err != nil {
		n.Close(0)
		return nil, err
	}
	return n, nil
}

// startFault puts a failure of the daemon's constructor into an operator's words.
func startFault(c config.Config, err error) error {
	var f *fault.Fault
	if errors.As(err, &f) {
		return err
	}
	// Only the control listener's error keeps its type.
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "listen" {
		return fault.New("control socket "+c.ListenAddr.String(), errnoOf(err), "pass another -listen")
	}
	return fault.New("libp2p host", err, "check -hostAddrs and the other network flags")
}

// options builds the libp2p options in upstream's order.
func (n *Node) options(c config.Config, warn func(string)) ([]libp2p.Option, error) {
	agent := c.UserAgent
	if agent == "" {
		agent = version.UserAgent()
	}
	opts := []libp2p.Option{
		libp2p.UserAgent(agent),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		// The daemon keeps the host to itself; this hands it to the services here.
		libp2p.WithFxOption(fx.Invoke(func(h host.Host) { n.host = h })),
	}
	if c.ProtocolVersion != "" {
		opts = append(opts, libp2p.ProtocolVersion(c.ProtocolVersion))
	}
	if c.ID != "" {
		key, err := readIdentity(c.ID, warn)
		if err != nil {
			return nil, err
		}
		opts = append(opts, libp2p.Identity(key))
	}

	network, err := networkOptions(c, warn)
	if err != nil {
		return nil, err
	}
	opts = append(opts, network...)

	limits, err := limitOptions(c)
	if err != nil {
		return nil, err
	}
	opts = append(opts, limits...)
	return append(opts, n.reachabilityOptions(c)...), nil
}

// networkOptions are transports, secure channels and addresses.
func networkOptions(c config.Config, warn func(string)) ([]libp2p.Option, error) {
	opts := []libp2p.Option{libp2p.Transport(tcp.NewTCPTransport), libp2p.Transport(ws.New)}
	if c.PSK != "" {
		key, err := readPSK(c.PSK, warn)
		if err != nil {
			return nil, err
		}
		opts = append(opts, libp2p.PrivateNetwork(key))
	} else {
		opts = append(opts, libp2p.Transport(quic.NewTransport))
	}
	if c.Security.Noise {
		opts = append(opts, libp2p.Security(noise.ID, noise.New))
	}
	if c.Security.TLS {
		opts = append(opts, libp2p.Security(tls.ID, tls.New))
	}
	switch {
	case c.NoListen:
		opts = append(opts, libp2p.NoListenAddrs)
		if c.Relay.Enabled {
			// NoListenAddrs turns the circuit transport off.
			opts = append(opts, libp2p.EnableRelay())
		}
	case len(c.HostAddresses) > 0:
		opts = append(opts, libp2p.ListenAddrs(c.HostAddresses...))
	}
	if len(c.AnnounceAddresses) > 0 {
		opts = append(opts, libp2p.AddrsFactory(func([]ma.Multiaddr) []ma.Multiaddr { return c.AnnounceAddresses }))
	}
	return opts, nil
}

// limitOptions are the resource and the connection manager.
func limitOptions(c config.Config) ([]libp2p.Option, error) {
	circuits := 0
	if c.Relay.Hop {
		circuits = relayCircuits(c.Relay)
	}
	withMetrics := c.MetricsAddress != ""
	manager, err := newResourceManager(c.StreamsPerProtocolPeer, c.ConnsPerIP, circuits, withMetrics)
	if err != nil {
		return nil, fault.New("resource manager", err, "check -streamsPerProtocolPeer and -connsPerIP")
	}
	opts := []libp2p.Option{libp2p.ResourceManager(manager)}
	if !withMetrics {
		// Counting every stream for nobody costs CPU on the hot path.
		opts = append(opts, libp2p.DisableMetrics())
	}
	if c.ConnectionManager.Enabled {
		m, err := connmgr.NewConnManager(c.ConnectionManager.LowWaterMark, c.ConnectionManager.HighWaterMark,
			connmgr.WithGracePeriod(time.Duration(c.ConnectionManager.GracePeriod)))
		if err != nil {
			return nil, fault.New("connection manager", err, "check -connLo, -connHi and -connGrace")
		}
		opts = append(opts, libp2p.ConnectionManager(m))
	}
	return opts, nil
}

// reachabilityOptions are NAT, AutoNAT, relays and hole punching.
func (n *Node) reachabilityOptions(c config.Config) []libp2p.Option {
	var opts []libp2p.Option
	if c.NatPortMap {
		opts = append(opts, libp2p.NATPortMap())
	}
	if c.AutoNat {
		opts = append(opts, libp2p.EnableNATService(), libp2p.EnableAutoNATv2())
	}
	switch c.ForceReachability {
	case config.ReachabilityPublic:
		opts = append(opts, libp2p.ForceReachabilityPublic())
	case config.ReachabilityPrivate:
		opts = append(opts, libp2p.ForceReachabilityPrivate())
	}
	if !c.Relay.Enabled {
		return append(opts, libp2p.DisableRelay())
	}
	if len(c.StaticRelays) > 0 {
		// The configuration has checked that every address names its peer.
		relays, _ := peer.AddrInfosFromP2pAddrs(c.StaticRelays...)
		opts = append(opts, libp2p.EnableAutoRelayWithStaticRelays(relays, autoRelayPace()...))
		if len(c.AnnounceAddresses) == 0 {
			opts = append(opts, libp2p.AddrsFactory(withCircuits(c.StaticRelays, func() host.Host { return n.host })))
		}
	} else if c.Relay.Auto {
		source := connectedRelays(func() host.Host { return n.host })
		opts = append(opts, libp2p.EnableAutoRelayWithPeerSource(source, autoRelayPace()...))
	}
	if c.HolePunch {
		opts = append(opts, libp2p.EnableHolePunching())
	}
	return opts
}

// startServices adds what runs on a started host.
func (n *Node) startServices(ctx context.Context, c config.Config, warn func(string)) error {
	if !c.NoListen {
		if err := checkListening(c.HostAddresses, n.host.Network().ListenAddresses()); err != nil {
			return err
		}
	}
	if c.PubSub.Enabled {
		// The router takes its parameters from these package variables when it
		// is made, and reads them again later: they must be set before, once.
		if d := time.Duration(c.PubSub.GossipSubHeartbeat.Interval); d > 0 {
			ps.GossipSubHeartbeatInterval = d
		}
		if d := time.Duration(c.PubSub.GossipSubHeartbeat.InitialDelay); d > 0 {
			ps.GossipSubHeartbeatInitialDelay = d
		}
		if n := c.PubSub.GossipSubDegree; n > 0 {
			// Never below the library's own, which its other parameters go with.
			ps.GossipSubD, ps.GossipSubDhi = max(n, ps.GossipSubD), max(2*n, ps.GossipSubDhi)
		}
		if err := n.daemon.EnablePubsub(c.PubSub.Router, c.PubSub.Sign, c.PubSub.SignStrict); err != nil {
			return fault.New("pubsub", err, "check the -pubsub flags")
		}
	}
	if c.Relay.Hop {
		r, err := startRelay(n.host, c.Relay)
		if err != nil {
			return fault.New("relay service (-relayHop)", err, "check the -relay flags")
		}
		n.closers = append(n.closers, r)
	}
	if c.Echo {
		if err := n.daemon.EnableEcho(); err != nil {
			return fault.New("echo", err, "leave -echo out")
		}
	}
	if c.MDNS.Enabled {
		s, err := mdns.Start(ctx, n.host, c.MDNS.ServiceTag)
		if err != nil {
			// Containers often have no multicast; the node works without.
			warn(fmt.Sprintf("mDNS (-mdns) does not run: %v; listen on an address of the local link, or leave -mdns out", err))
		} else {
			n.closers = append(n.closers, s)
		}
	}
	if c.Bootstrap.Enabled {
		p2pd.BootstrapPeers = c.Bootstrap.Peers
		go n.bootstrap(ctx, warn)
	}
	return nil
}

// bootstrap dials the bootstrap peers until one answers; from then on the
// daemon keeps the connections itself. Upstream's main ends if none answers,
// which takes a whole network down when its validators restart.
func (n *Node) bootstrap(ctx context.Context, warn func(string)) {
	for wait := bootstrapFirstRetry; ; wait = min(2*wait, bootstrapMaxRetry) {
		err := n.daemon.Bootstrap()
		if err == nil || ctx.Err() != nil {
			return
		}
		warn(fmt.Sprintf("bootstrap (-b): %v; trying again in %s", err, wait))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// ID is the peer id.
func (n *Node) ID() peer.ID { return n.daemon.ID() }

// Addrs are the addresses that the host announces.
func (n *Node) Addrs() []ma.Multiaddr { return n.daemon.Addrs() }

// ControlAddr is where the control protocol is served, with the real port.
func (n *Node) ControlAddr() ma.Multiaddr { return n.daemon.Listener().Multiaddr() }

// Close removes the control socket at once, so that nobody new finds a node
// that is going, and closes the host for at most patience. The process must
// end soon after: what did not close in time is left to that.
//
// The daemon's own Close is not used: it unlinks the socket last, after the
// host, and its accept loop then logs an error.
func (n *Node) Close(patience time.Duration) {
	n.socket.Remove()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, c := range n.closers {
			_ = c.Close()
		}
		_ = n.host.Close()
	}()
	select {
	case <-done:
	case <-time.After(patience):
	}
}
