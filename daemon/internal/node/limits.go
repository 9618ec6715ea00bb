package node

import (
	"net/netip"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/libp2p/go-libp2p/x/rate"
)

const (
	// streamWindowBytes is what yamux reserves for each open stream in the
	// books of the peer and of the system; no such memory is allocated yet.
	// Source: go-yamux v5, initialStreamWindow.
	streamWindowBytes = 256 << 10
	// protocolsPerPeer leaves room for streams of the DHT, pubsub and identify,
	// and for a second protocol at its own limit.
	protocolsPerPeer = 2
	// busyPeers is how many peers can use their whole allowance at once.
	busyPeers = 8
	// systemConns and transientConns serve a validator with its many clients;
	// the connection manager, not this ceiling, decides who stays.
	systemConns    = 4096
	transientConns = 512
	// minSystemMemory keeps the limits usable on a machine of 1 GiB, for which
	// libp2p would book an eighth.
	minSystemMemory = 1 << 30
)

// newResourceManager builds limits under which one peer can hold
// streamsPerProtocolPeer streams of a protocol each way, and one address
// connsPerIP connections. libp2p's defaults are 64 and 8.
func newResourceManager(streamsPerProtocolPeer, connsPerIP, relayCircuits int, withMetrics bool) (network.ResourceManager, error) {
	opts := []rcmgr.Option{
		rcmgr.WithLimitPerSubnet(
			[]rcmgr.ConnLimitPerSubnet{{PrefixLength: 32, ConnCount: connsPerIP}},
			// A household or a host is usually given a /64.
			[]rcmgr.ConnLimitPerSubnet{{PrefixLength: 128, ConnCount: connsPerIP}, {PrefixLength: 64, ConnCount: 4 * connsPerIP}},
		),
		rcmgr.WithConnRateLimiters(newConnRateLimiter(connsPerIP)),
	}
	if !withMetrics {
		opts = append(opts, rcmgr.WithMetricsDisabled())
	}
	limits := scaledLimits(streamsPerProtocolPeer, relayCircuits)
	return rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(limits.AutoScale()), opts...)
}

// scaledLimits raises libp2p's default limits for streamsPerProtocolPeer.
func scaledLimits(n, relayCircuits int) rcmgr.ScalingLimitConfig {
	limits := rcmgr.DefaultLimits
	libp2p.SetDefaultServiceLimits(&limits)

	// The flag means what it says: neither libp2p's floor nor its growth with
	// the machine's memory, so that both sides can count on the number.
	base, growth := &limits.ProtocolPeerBaseLimit, &limits.ProtocolPeerLimitIncrease
	base.StreamsInbound, base.StreamsOutbound, base.Streams = n, n, 2*n
	growth.StreamsInbound, growth.StreamsOutbound, growth.Streams = 0, 0, 0

	raiseStreams(&limits.PeerBaseLimit, protocolsPerPeer*n, 2*protocolsPerPeer*n)
	raiseStreams(&limits.ProtocolBaseLimit, busyPeers*n, 2*busyPeers*n)
	// A stream is transient until its protocol is negotiated.
	raiseStreams(&limits.TransientBaseLimit, n, 2*n)
	raiseStreams(&limits.SystemBaseLimit, protocolsPerPeer*busyPeers*n, 2*protocolsPerPeer*busyPeers*n)

	raiseMemory(&limits.PeerBaseLimit, int64(protocolsPerPeer*n)*streamWindowBytes)
	raiseMemory(&limits.TransientBaseLimit, int64(n)*streamWindowBytes)
	raiseMemory(&limits.ProtocolPeerBaseLimit, int64(n)*streamWindowBytes)
	raiseMemory(&limits.ProtocolBaseLimit, int64(busyPeers*n)*streamWindowBytes)
	raiseMemory(&limits.SystemBaseLimit, max(minSystemMemory, int64(protocolsPerPeer*n)*streamWindowBytes))

	raiseConns(&limits.SystemBaseLimit, systemConns)
	raiseConns(&limits.TransientBaseLimit, transientConns)

	if relayCircuits > 0 {
		raiseRelay(&limits, relayCircuits)
	}
	return limits
}

// raiseRelay lets the relay service hold circuits streams with one peer; each
// circuit is a stream with either end.
func raiseRelay(limits *rcmgr.ScalingLimitConfig, circuits int) {
	perPeer := rcmgr.BaseLimit{StreamsInbound: circuits, StreamsOutbound: circuits, Streams: 2 * circuits, Memory: 64 << 20}
	all := rcmgr.BaseLimit{StreamsInbound: busyPeers * circuits, StreamsOutbound: busyPeers * circuits, Streams: 2 * busyPeers * circuits, Memory: 256 << 20}
	limits.AddServicePeerLimit(relay.ServiceName, perPeer, rcmgr.BaseLimitIncrease{})
	limits.AddServiceLimit(relay.ServiceName, all, rcmgr.BaseLimitIncrease{})
	for _, id := range []protocol.ID{proto.ProtoIDv2Hop, proto.ProtoIDv2Stop} {
		limits.AddProtocolPeerLimit(id, perPeer, rcmgr.BaseLimitIncrease{})
		limits.AddProtocolLimit(id, all, rcmgr.BaseLimitIncrease{})
	}
}

func raiseStreams(l *rcmgr.BaseLimit, each, total int) {
	l.StreamsInbound = max(l.StreamsInbound, each)
	l.StreamsOutbound = max(l.StreamsOutbound, each)
	l.Streams = max(l.Streams, total)
}

func raiseMemory(l *rcmgr.BaseLimit, bytes int64) { l.Memory = max(l.Memory, bytes) }

func raiseConns(l *rcmgr.BaseLimit, n int) {
	l.ConnsInbound = max(l.ConnsInbound, n)
	l.ConnsOutbound = max(l.ConnsOutbound, n)
	l.Conns = max(l.Conns, 2*n)
}

// newConnRateLimiter lets an address make its whole allowance of connections at
// once, and again each 16 s. libp2p's default is 16 and then one each 5 s,
// which a restarted house of nodes behind one NAT runs into.
func newConnRateLimiter(connsPerIP int) *rate.Limiter {
	limit := rate.Limit{RPS: float64(max(connsPerIP, 16)) / 16, Burst: 2 * connsPerIP}
	wide := rate.Limit{RPS: 4 * limit.RPS, Burst: 4 * limit.Burst}
	return &rate.Limiter{
		NetworkPrefixLimits: []rate.PrefixLimit{
			{Prefix: netip.MustParsePrefix("127.0.0.0/8")},
			{Prefix: netip.MustParsePrefix("::1/128")},
		},
		SubnetRateLimiter: rate.SubnetLimiter{
			IPv4SubnetLimits: []rate.SubnetLimit{{PrefixLength: 32, Limit: limit}},
			IPv6SubnetLimits: []rate.SubnetLimit{{PrefixLength: 128, Limit: limit}, {PrefixLength: 64, Limit: wide}},
		},
	}
}
