// Package config turns the command line, and the JSON document that upstream's
// -f and -i read, into one checked value. It opens nothing but that document.
package config

import (
	"time"

	ma "github.com/multiformats/go-multiaddr"

	upstream "github.com/libp2p/go-libp2p-daemon/config"
)

// Config is everything that the daemon is told. Its first part has the names
// and the nesting of upstream's JSON configuration; the fields after Echo are
// this program's own and may stand in the same document.
type Config struct {
	// ListenAddr is where the control protocol is served.
	ListenAddr Maddr
	// Quiet leaves out the lines on standard output.
	Quiet bool
	// ID is the path of a libp2p-marshalled private key; empty makes a fresh identity.
	ID string
	// Bootstrap is -b and -bootstrapPeers.
	Bootstrap Bootstrap
	// DHT is -dht, -dhtClient, -dhtServer.
	DHT DHT
	// ConnectionManager is -connManager and its water marks.
	ConnectionManager ConnectionManager
	// QUIC is accepted from upstream's documents and has no effect, as there:
	// the host addresses decide.
	QUIC bool
	// NatPortMap asks the router for a port by UPnP or NAT-PMP.
	NatPortMap bool
	// PubSub is -pubsub and its settings.
	PubSub PubSub
	// Relay is the circuit transport and the hop service.
	Relay Relay
	// AutoNat answers other peers' reachability questions and asks its own.
	AutoNat bool
	// HostAddresses are listened on; empty listens on none, as upstream.
	HostAddresses Maddrs
	// AnnounceAddresses replace what identify tells about this host.
	AnnounceAddresses Maddrs
	// NoListen listens on no address even if HostAddresses are given.
	NoListen bool
	// MetricsAddress is host:port of the Prometheus handler; empty has none.
	MetricsAddress string
	// PProf is the debugging handler on localhost.
	PProf PProf
	// Security chooses the secure channels.
	Security Security
	// Echo serves /echo/1.0.0.
	Echo bool

	// Muxer can only be "yamux".
	Muxer string
	// ForceReachability is "", "public" or "private".
	ForceReachability string
	// UserAgent is identify's agent version.
	UserAgent string
	// ProtocolVersion is identify's protocol version; empty keeps libp2p's.
	ProtocolVersion string
	// StreamsPerProtocolPeer limits open streams of one protocol with one peer, each way.
	StreamsPerProtocolPeer int
	// ConnsPerIP limits open connections with one IP address; loopback has no limit.
	ConnsPerIP int
	// ControlMode is the permission of a unix control socket.
	ControlMode FileMode
	// ControlAllowRemote permits a TCP control address that is not loopback.
	ControlAllowRemote bool
	// ExitOnStdinEOF ends the daemon when standard input ends.
	ExitOnStdinEOF bool
	// PSK is the path of a pre-shared key; empty is a public network.
	PSK string
	// MDNS is discovery on the local link.
	MDNS MDNS
	// StaticRelays are used by AutoRelay; each ends in /p2p/<id>.
	StaticRelays Maddrs
	// HolePunch upgrades relayed connections to direct ones (DCUtR).
	HolePunch bool
}

// Bootstrap says whom to dial at start.
type Bootstrap struct {
	// Enabled dials Peers at start, and again until one of them answers.
	Enabled bool
	// Peers end in /p2p/<id>. There is no built-in list.
	Peers Maddrs
}

// DHT says how the node takes part in the Kademlia DHT.
type DHT struct {
	// Mode is "" (off), "full" (by reachability), "client" or "server".
	Mode string
}

// ConnectionManager trims connections above a high water mark.
type ConnectionManager struct {
	// Enabled replaces libp2p's own marks (160 and 192) with these.
	Enabled bool
	// LowWaterMark is the number of connections that trimming leaves.
	LowWaterMark int
	// HighWaterMark is the number of connections that starts trimming.
	HighWaterMark int
	// GracePeriod spares young connections.
	GracePeriod Duration
}

// PubSub is the publish/subscribe service.
type PubSub struct {
	// Enabled starts it.
	Enabled bool
	// Router is "gossipsub" or "floodsub".
	Router string
	// Sign signs published messages.
	Sign bool
	// SignStrict refuses messages without a valid signature.
	SignStrict bool
	// GossipSubHeartbeat is the router's clock.
	GossipSubHeartbeat GossipSubHeartbeat
	// GossipSubDegree is the number of peers that a mesh is meant to have, up
	// to twice as many are let in; 0 keeps the library's (6, 12).
	GossipSubDegree int
}

// GossipSubHeartbeat is the pace at which meshes are kept.
type GossipSubHeartbeat struct {
	// Interval between heartbeats; 0 keeps the library's (1 s).
	Interval Duration
	// InitialDelay before the first one; 0 keeps the library's (100 ms).
	InitialDelay Duration
}

// Relay is circuit relay v2: the transport, and the service for others.
type Relay struct {
	// Enabled is the circuit transport: dial and be dialled through relays.
	Enabled bool
	// Active is accepted and has no effect, as upstream (circuit v1).
	Active bool
	// Hop serves circuits to others.
	Hop bool
	// Discovery is accepted and has no effect, as upstream (circuit v1).
	Discovery bool
	// Auto finds relays among connected peers when this node is not reachable.
	Auto bool
	// HopLimit, when positive, is the same as MaxCircuits (circuit v1's name).
	HopLimit int
	// MaxCircuits limits open circuits per peer of the service; 0 is unlimited.
	MaxCircuits int
	// MaxReservations limits the peers that hold a reservation; 0 is unlimited.
	MaxReservations int
	// LimitData is the bytes each way after which a circuit is reset; 0 is unlimited.
	LimitData int64
	// LimitDuration is the age at which a circuit is reset; 0 is unlimited.
	LimitDuration Duration
}

// PProf is Go's profiler over HTTP, on localhost only.
type PProf struct {
	// Enabled starts it.
	Enabled bool
	// Port to bind; 0 takes the first free one from 6060 to 7080.
	Port uint
}

// Security chooses the secure channels that are offered and accepted.
type Security struct {
	// Noise offers /noise.
	Noise bool
	// TLS offers /tls/1.0.0.
	TLS bool
	// Plaintext is refused: the field is there so that the refusal is a sentence.
	Plaintext bool
}

// MDNS is discovery on the local link by multicast DNS.
type MDNS struct {
	// Enabled announces this node and dials those found.
	Enabled bool
	// ServiceTag separates networks that share a link; empty is libp2p's "_p2p._udp".
	ServiceTag string
}

// DHT modes, as upstream names them.
const (
	DHTFull   = upstream.DHTFullMode
	DHTClient = upstream.DHTClientMode
	DHTServer = upstream.DHTServerMode
)

// Values of Config.ForceReachability.
const (
	ReachabilityPublic  = "public"
	ReachabilityPrivate = "private"
)

// Defaults that differ from upstream's or that upstream lacks.
const (
	// DefaultStreamsPerProtocolPeer is 64 times upstream's: every exchange in
	// flight with a peer holds a stream.
	DefaultStreamsPerProtocolPeer = 4096
	// DefaultConnsPerIP lets many nodes share an address (NAT, one machine).
	DefaultConnsPerIP = 256
	// DefaultControlMode keeps other users off the socket: it owns the node.
	DefaultControlMode = 0o600
	// DefaultRelayMaxCircuits is per peer of the relay service.
	DefaultRelayMaxCircuits = 256
	// DefaultRelayMaxReservations is the number of NATed nodes a relay serves.
	DefaultRelayMaxReservations = 1024
	// DefaultRelayLimitData lets long answers through (libp2p's 128 KiB does not).
	DefaultRelayLimitData = 256 << 20
	// DefaultRelayLimitDuration outlives every exchange (libp2p's 2 min does not).
	DefaultRelayLimitDuration = time.Hour
)

// Default is the configuration without flags or document.
func Default() Config {
	return Config{
		ListenAddr: Maddr{ma.StringCast("/unix/tmp/p2pd.sock")},
		QUIC:       true,
		ConnectionManager: ConnectionManager{
			LowWaterMark:  256,
			HighWaterMark: 512,
			GracePeriod:   Duration(120 * time.Second),
		},
		PubSub: PubSub{Router: "gossipsub", Sign: true, SignStrict: true},
		Relay: Relay{
			Enabled:         true,
			MaxCircuits:     DefaultRelayMaxCircuits,
			MaxReservations: DefaultRelayMaxReservations,
			LimitData:       DefaultRelayLimitData,
			LimitDuration:   Duration(DefaultRelayLimitDuration),
		},
		Security:               Security{Noise: true, TLS: true},
		Muxer:                  "yamux",
		StreamsPerProtocolPeer: DefaultStreamsPerProtocolPeer,
		ConnsPerIP:             DefaultConnsPerIP,
		ControlMode:            DefaultControlMode,
	}
}
