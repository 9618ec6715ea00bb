package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/lloom/lloom-sidecar/daemon/internal/fault"
)

var (
	// ErrUsage means that the command line or the document is wrong: exit status 2.
	ErrUsage = errors.New("usage")
	// ErrHelp means that -help was asked for and printed: exit status 0.
	ErrHelp = flag.ErrHelp
	// ErrVersion means that -version was asked for: the caller prints it.
	ErrVersion = errors.New("version asked for")
)

// maxDocumentBytes bounds the JSON document: a path such as /dev/zero must not
// fill the memory.
const maxDocumentBytes = 1 << 20

// usageError carries a fault's text and matches ErrUsage.
type usageError struct{ *fault.Fault }

// Is makes errors.Is(err, ErrUsage) true without putting its text in the line.
func (usageError) Is(target error) bool { return target == ErrUsage }

func usage(what, cause, remedy string) error {
	return usageError{fault.New(what, errors.New(cause), remedy)}
}

// switches are the flags that are not settings: they say where to read from,
// or are spelled differently in the document.
type switches struct {
	stdin, version            bool
	filename                  string
	dht, dhtClient, dhtServer bool
	forcePublic, forcePrivate bool
}

// newFlagSet binds every flag to c, so that what c holds already (defaults, or
// a document over them) is the flag's default and an explicit flag wins.
func newFlagSet(c *Config, s *switches) *flag.FlagSet {
	f := flag.NewFlagSet("p2pd", flag.ContinueOnError)

	// Upstream's flags: same names, same meaning unless the text says otherwise.
	f.Var(&c.ListenAddr, "listen", "daemon control listen `multiaddr`")
	f.BoolVar(&c.Quiet, "q", c.Quiet, "be quiet")
	f.StringVar(&c.ID, "id", c.ID, "peer identity; private key `file` (libp2p-marshalled)")
	f.BoolVar(&c.Bootstrap.Enabled, "b", c.Bootstrap.Enabled, "connects to the peers of -bootstrapPeers and bootstraps the dht if enabled")
	f.Var(&c.Bootstrap.Peers, "bootstrapPeers", "comma separated list of bootstrap peers; there is no built-in list")
	f.BoolVar(&s.dht, "dht", false, "Enables the DHT in full node mode")
	f.BoolVar(&s.dhtClient, "dhtClient", false, "Enables the DHT in client mode")
	f.BoolVar(&s.dhtServer, "dhtServer", false, "Enables the DHT in server mode")
	f.BoolVar(&c.ConnectionManager.Enabled, "connManager", c.ConnectionManager.Enabled, "Enables the Connection Manager")
	f.IntVar(&c.ConnectionManager.LowWaterMark, "connLo", c.ConnectionManager.LowWaterMark, "Connection Manager Low Water mark")
	f.IntVar(&c.ConnectionManager.HighWaterMark, "connHi", c.ConnectionManager.HighWaterMark, "Connection Manager High Water mark")
	f.Var(&c.ConnectionManager.GracePeriod, "connGrace", "Connection Manager grace `period`")
	f.BoolVar(&c.NatPortMap, "natPortMap", c.NatPortMap, "Enables NAT port mapping")
	f.BoolVar(&c.PubSub.Enabled, "pubsub", c.PubSub.Enabled, "Enables pubsub")
	f.StringVar(&c.PubSub.Router, "pubsubRouter", c.PubSub.Router, "Specifies the pubsub router implementation: gossipsub or floodsub")
	f.BoolVar(&c.PubSub.Sign, "pubsubSign", c.PubSub.Sign, "Enables pubsub message signing")
	f.BoolVar(&c.PubSub.SignStrict, "pubsubSignStrict", c.PubSub.SignStrict, "Enables pubsub strict signature verification")
	f.Var(&c.PubSub.GossipSubHeartbeat.Interval, "gossipsubHeartbeatInterval", "Specifies the gossipsub heartbeat `interval`; 0 keeps the library's 1s")
	f.Var(&c.PubSub.GossipSubHeartbeat.InitialDelay, "gossipsubHeartbeatInitialDelay", "Specifies the gossipsub initial heartbeat `delay`; 0 keeps the library's 100ms")
	f.BoolVar(&c.Relay.Enabled, "relay", c.Relay.Enabled, "Enables the circuit relay transport; the service for others is -relayHop")
	f.BoolVar(&c.Relay.Active, "relayActive", c.Relay.Active, "accepted, no effect (circuit v1)")
	f.BoolVar(&c.Relay.Hop, "relayHop", c.Relay.Hop, "Serves as a relay for other peers")
	f.IntVar(&c.Relay.HopLimit, "relayHopLimit", c.Relay.HopLimit, "circuit v1's name of -relayMaxCircuits; used when positive")
	f.BoolVar(&c.Relay.Discovery, "relayDiscovery", c.Relay.Discovery, "accepted, no effect (circuit v1)")
	f.BoolVar(&c.Relay.Auto, "autoRelay", c.Relay.Auto, "Uses connected peers that relay, when this node cannot be reached; -staticRelays names them instead")
	f.BoolVar(&c.AutoNat, "autonat", c.AutoNat, "Enables the AutoNAT services, v1 and v2")
	f.Var(&c.HostAddresses, "hostAddrs", "comma separated list of multiaddrs the host should listen on; none without it")
	f.Var(&c.AnnounceAddresses, "announceAddrs", "comma separated list of multiaddrs the host should announce to the network")
	f.BoolVar(&c.NoListen, "noListenAddrs", c.NoListen, "sets the host to listen on no addresses")
	f.StringVar(&c.MetricsAddress, "metricsAddr", c.MetricsAddress, "a `host:port` to bind the metrics handler to")
	f.StringVar(&s.filename, "f", "", "a `file` from which to read a json representation of the daemon config")
	f.BoolVar(&s.stdin, "i", false, "have the daemon read the json config from stdin")
	f.BoolVar(&c.PProf.Enabled, "pprof", c.PProf.Enabled, "Enables the HTTP pprof handler on localhost, on the first port available in the range [6060-7080], or on -pprofPort")
	f.UintVar(&c.PProf.Port, "pprofPort", c.PProf.Port, "Binds the HTTP pprof handler to a specific port; has no effect unless the pprof option is enabled")
	f.BoolVar(&c.Security.Noise, "noise", c.Security.Noise, "Enables Noise channel security protocol")
	f.BoolVar(&c.Security.TLS, "tls", c.Security.TLS, "Enables TLS1.3 channel security protocol")
	f.BoolVar(&c.Security.Plaintext, "plaintext", c.Security.Plaintext, "refused when true: connections are always encrypted")
	f.BoolVar(&s.forcePublic, "forceReachabilityPublic", false, "Set up ForceReachability as public for autonat")
	f.BoolVar(&s.forcePrivate, "forceReachabilityPrivate", false, "Set up ForceReachability as private for autonat")
	f.StringVar(&c.Muxer, "muxer", c.Muxer, "muxer to use for connections; only yamux")
	f.BoolVar(&c.Echo, "echo", c.Echo, "Enables echo protocol")

	// This program's own.
	f.IntVar(&c.PubSub.GossipSubDegree, "gossipsubDegree", c.PubSub.GossipSubDegree, "peers that a gossipsub mesh is meant to have, up to twice as many are let in; 0 keeps the library's 6 and 12")
	f.StringVar(&c.UserAgent, "userAgent", c.UserAgent, "identify's agent `version`")
	f.StringVar(&c.ProtocolVersion, "protocolVersion", c.ProtocolVersion, "identify's protocol `version`")
	f.IntVar(&c.StreamsPerProtocolPeer, "streamsPerProtocolPeer", c.StreamsPerProtocolPeer, "limit of open streams of one protocol with one peer, each way")
	f.IntVar(&c.ConnsPerIP, "connsPerIP", c.ConnsPerIP, "limit of open connections with one IP address; loopback has none")
	f.Var(&c.ControlMode, "controlMode", "permission of a unix control socket, in octal")
	f.BoolVar(&c.ControlAllowRemote, "controlAllowRemote", c.ControlAllowRemote, "permits a TCP -listen address that is not loopback (whoever reaches it owns the node)")
	f.BoolVar(&c.ExitOnStdinEOF, "exitOnStdinEOF", c.ExitOnStdinEOF, "exits as soon as standard input ends")
	f.BoolVar(&s.version, "version", false, "prints the version and exits")
	f.StringVar(&c.PSK, "psk", c.PSK, "pre-shared key `file` of a private network (swarm.key format, 64 hex digits, or 32 bytes); TCP only")
	f.BoolVar(&c.MDNS.Enabled, "mdns", c.MDNS.Enabled, "finds peers on the local link")
	f.StringVar(&c.MDNS.ServiceTag, "mdnsServiceTag", c.MDNS.ServiceTag, "mDNS service `tag`; only peers with the same find each other")
	f.Var(&c.StaticRelays, "staticRelays", "comma separated list of relays to reserve a slot with when this node cannot be reached")
	f.BoolVar(&c.HolePunch, "holePunch", c.HolePunch, "makes relayed connections direct where NATs allow it (DCUtR)")
	f.IntVar(&c.Relay.MaxCircuits, "relayMaxCircuits", c.Relay.MaxCircuits, "with -relayHop: limit of open circuits per peer; 0 is unlimited")
	f.IntVar(&c.Relay.MaxReservations, "relayMaxReservations", c.Relay.MaxReservations, "with -relayHop: limit of peers that hold a reservation; 0 is unlimited")
	f.Int64Var(&c.Relay.LimitData, "relayLimitData", c.Relay.LimitData, "with -relayHop: `bytes` each way after which a circuit is reset; 0 is unlimited")
	f.Var(&c.Relay.LimitDuration, "relayLimitDuration", "with -relayHop: `age` at which a circuit is reset; 0 is unlimited")
	return f
}

// Parse reads args, and the JSON document that -f or -i names, and checks the
// result. Explicit flags win over the document, the document over defaults.
//
// stdin is read to its end only with -i; help goes to stderr, where upstream's
// goes. The error is ErrHelp, ErrVersion, matches ErrUsage, or tells why the
// document cannot be read.
func Parse(args []string, stdin io.Reader, stderr io.Writer) (Config, error) {
	// The first pass only finds the document and refuses bad flags.
	scratch, first := Default(), switches{}
	f := newFlagSet(&scratch, &first)
	f.SetOutput(io.Discard)
	f.Usage = func() {}
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			f.SetOutput(stderr)
			fmt.Fprintln(stderr, "Usage of p2pd:")
			f.PrintDefaults()
			return Config{}, ErrHelp
		}
		return Config{}, usage("command line", err.Error(), "see p2pd -help")
	}
	if first.version {
		return Config{}, ErrVersion
	}
	if f.NArg() > 0 {
		return Config{}, usage("command line", fmt.Sprintf("unexpected argument %q", f.Arg(0)), "every setting is a flag, see p2pd -help")
	}

	c := Default()
	if first.stdin {
		if err := load(&c, "standard input (-i)", stdin); err != nil {
			return Config{}, err
		}
	} else if first.filename != "" {
		file, err := os.Open(first.filename)
		if err != nil {
			return Config{}, fault.New("config file (-f) "+first.filename, pathCause(err), "name a readable JSON file")
		}
		defer file.Close()
		if err := load(&c, "config file (-f) "+first.filename, file); err != nil {
			return Config{}, err
		}
	}

	s := switches{}
	f = newFlagSet(&c, &s)
	f.SetOutput(io.Discard)
	f.Usage = func() {}
	if err := f.Parse(args); err != nil {
		return Config{}, usage("command line", err.Error(), "see p2pd -help")
	}
	switch {
	case s.dht:
		c.DHT.Mode = DHTFull
	case s.dhtClient:
		c.DHT.Mode = DHTClient
	case s.dhtServer:
		c.DHT.Mode = DHTServer
	}
	if s.forcePublic && s.forcePrivate {
		return Config{}, usage("-forceReachabilityPublic and -forceReachabilityPrivate", "reachability cannot be both", "pass one of them")
	}
	if s.forcePublic {
		c.ForceReachability = ReachabilityPublic
	} else if s.forcePrivate {
		c.ForceReachability = ReachabilityPrivate
	}
	if first.stdin && c.ExitOnStdinEOF {
		return Config{}, usage("-i and -exitOnStdinEOF", "standard input cannot be both the document and the lifeline", "put the document in a file and pass -f")
	}
	return c, c.check()
}

// load reads one JSON document over c.
func load(c *Config, from string, r io.Reader) error {
	body, err := io.ReadAll(io.LimitReader(r, maxDocumentBytes+1))
	if err != nil {
		return fault.New(from, pathCause(err), "name a readable JSON file")
	}
	if len(body) > maxDocumentBytes {
		return usage(from, "the document is over 1 MiB", "pass a smaller one")
	}
	d := json.NewDecoder(bytes.NewReader(body))
	// A misspelled setting that is silently ignored could leave a node open.
	d.DisallowUnknownFields()
	if err := d.Decode(c); err != nil {
		return usage(from, "not a valid configuration: "+err.Error(), "correct the document")
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return usage(from, "not a valid configuration: more than one JSON value", "correct the document")
	}
	return nil
}

// pathCause drops the operation and the path that os errors repeat.
func pathCause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
