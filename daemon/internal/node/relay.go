package node

import (
	"context"
	"math"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/host/autorelay"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/lloom/lloom-sidecar/daemon/internal/config"
)

// AutoRelay's pace. Its defaults (3 min, 1 h, 30 s) suit a crawl of the public
// network; here the relays are few, known and wanted at once.
const (
	autoRelayBootDelay   = 2 * time.Second
	autoRelayBackoff     = 20 * time.Second
	autoRelayMinInterval = 5 * time.Second
)

// unlimitedDuration stands for "no limit" beside a limit of data: the wire
// holds 32 bits of seconds.
const unlimitedDuration = 10 * 365 * 24 * time.Hour

func autoRelayPace() []autorelay.Option {
	return []autorelay.Option{
		autorelay.WithBootDelay(autoRelayBootDelay),
		autorelay.WithBackoff(autoRelayBackoff),
		autorelay.WithMinInterval(autoRelayMinInterval),
	}
}

// connectedRelays offers the connected peers that speak the relay protocol, for
// -autoRelay without a list. getHost may return nil until the host is up.
func connectedRelays(getHost func() host.Host) autorelay.PeerSource {
	return func(ctx context.Context, num int) <-chan peer.AddrInfo {
		found := make(chan peer.AddrInfo, num)
		defer close(found)
		h := getHost()
		if h == nil {
			return found
		}
		for _, id := range h.Network().Peers() {
			if len(found) == num || ctx.Err() != nil {
				break
			}
			if protocols, err := h.Peerstore().SupportsProtocols(id, proto.ProtoIDv2Hop); err == nil && len(protocols) > 0 {
				found <- h.Peerstore().PeerInfo(id)
			}
		}
		return found
	}
}

// autoRelayTag protects the connection to a relay that gave a reservation.
// Source: go-libp2p v0.51, autorelay/relay_finder.go.
const autoRelayTag = "autorelay"

// withCircuits is an address factory that adds the circuit addresses through
// static relays which hold a reservation. AutoRelay announces only those with a
// public address, so that a node in a private network (cluster, laboratory)
// would be reachable and not say so.
func withCircuits(static []ma.Multiaddr, getHost func() host.Host) func([]ma.Multiaddr) []ma.Multiaddr {
	return func(addrs []ma.Multiaddr) []ma.Multiaddr {
		h := getHost()
		if h == nil {
			return addrs
		}
		out := slices.Clone(addrs)
		for _, relayAddr := range static {
			_, id := peer.SplitAddr(relayAddr)
			if h.ConnManager().IsProtected(id, autoRelayTag) && h.Network().Connectedness(id) == network.Connected {
				out = append(out, relayAddr.Encapsulate(circuitSuffix))
			}
		}
		return ma.Unique(out)
	}
}

var circuitSuffix = ma.StringCast("/p2p-circuit")

// relayCircuits is the limit of circuits per peer, where 0 is unlimited.
func relayCircuits(r config.Relay) int {
	n := r.MaxCircuits
	if r.HopLimit > 0 {
		n = r.HopLimit
	}
	if n == 0 {
		return math.MaxInt32 / (2 * busyPeers)
	}
	return n
}

// relayResources translates the flags into the service's limits.
func relayResources(r config.Relay) relay.Resources {
	res := relay.DefaultResources()
	res.MaxCircuits = relayCircuits(r)
	res.MaxReservations = r.MaxReservations
	if res.MaxReservations == 0 {
		res.MaxReservations = math.MaxInt32
	}
	// Many nodes of one house or one cluster share an address.
	res.MaxReservationsPerIP = res.MaxReservations
	res.MaxReservationsPerASN = res.MaxReservations
	if r.LimitData == 0 && r.LimitDuration == 0 {
		res.Limit = nil
		return res
	}
	res.Limit = &relay.RelayLimit{Data: r.LimitData, Duration: time.Duration(r.LimitDuration)}
	if res.Limit.Data == 0 {
		res.Limit.Data = math.MaxInt64
	}
	if res.Limit.Duration == 0 {
		res.Limit.Duration = unlimitedDuration
	}
	return res
}

// startRelay serves circuits. libp2p's own option starts the service only once
// AutoNAT has proved that the host is public; an operator who asks for a relay
// knows that it can be reached.
func startRelay(h host.Host, r config.Relay) (*relay.Relay, error) {
	return relay.New(h,
		relay.WithResources(relayResources(r)),
		// A relay in a private network (cluster, laboratory) has private addresses.
		relay.WithReservationAddressFilter(func(ma.Multiaddr) bool { return true }),
	)
}
