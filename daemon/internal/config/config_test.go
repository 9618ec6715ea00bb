package config

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

const somePeer = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWPDkReLViQqhC5joxUfjaLBXJL9cXur2Z1b2ZzB1vygDJ"

func parse(t *testing.T, args ...string) Config {
	t.Helper()
	c, err := Parse(args, strings.NewReader(""), &bytes.Buffer{})
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return c
}

// TestEveryUpstreamFlagParses holds the whole list of upstream's flags (v0.9.2)
// with a value that its users pass, and what it must change.
func TestEveryUpstreamFlagParses(t *testing.T) {
	document := filepath.Join(t.TempDir(), "c.json")
	if err := os.WriteFile(document, []byte(`{"Echo":true}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args string
		got  func(Config) any
		want any
	}{
		{"-listen /unix/run/x.sock", func(c Config) any { return c.ListenAddr.String() }, "/unix/run/x.sock"},
		{"-q", func(c Config) any { return c.Quiet }, true},
		{"-id key", func(c Config) any { return c.ID }, "key"},
		{"-b -bootstrapPeers " + somePeer, func(c Config) any { return c.Bootstrap.Enabled }, true},
		{"-bootstrapPeers " + somePeer, func(c Config) any { return c.Bootstrap.Peers.String() }, somePeer},
		{"-dht", func(c Config) any { return c.DHT.Mode }, "full"},
		{"-dhtClient", func(c Config) any { return c.DHT.Mode }, "client"},
		{"-dhtServer", func(c Config) any { return c.DHT.Mode }, "server"},
		{"-connManager", func(c Config) any { return c.ConnectionManager.Enabled }, true},
		{"-connLo 5", func(c Config) any { return c.ConnectionManager.LowWaterMark }, 5},
		{"-connHi 6", func(c Config) any { return c.ConnectionManager.HighWaterMark }, 6},
		{"-connGrace 7s", func(c Config) any { return c.ConnectionManager.GracePeriod }, Duration(7 * time.Second)},
		{"-natPortMap", func(c Config) any { return c.NatPortMap }, true},
		{"-pubsub", func(c Config) any { return c.PubSub.Enabled }, true},
		{"-pubsubRouter floodsub", func(c Config) any { return c.PubSub.Router }, "floodsub"},
		{"-pubsubSign=false", func(c Config) any { return c.PubSub.Sign }, false},
		{"-pubsubSignStrict=false", func(c Config) any { return c.PubSub.SignStrict }, false},
		{"-gossipsubHeartbeatInterval 10s", func(c Config) any { return c.PubSub.GossipSubHeartbeat.Interval }, Duration(10 * time.Second)},
		{"-gossipsubHeartbeatInitialDelay 1s", func(c Config) any { return c.PubSub.GossipSubHeartbeat.InitialDelay }, Duration(time.Second)},
		{"-gossipsubDegree 64", func(c Config) any { return c.PubSub.GossipSubDegree }, 64},
		{"-relay=false", func(c Config) any { return c.Relay.Enabled }, false},
		{"-relayActive", func(c Config) any { return c.Relay.Active }, true},
		{"-relayHop", func(c Config) any { return c.Relay.Hop }, true},
		{"-relayHopLimit 3", func(c Config) any { return c.Relay.HopLimit }, 3},
		{"-relayDiscovery", func(c Config) any { return c.Relay.Discovery }, true},
		{"-autoRelay -dht", func(c Config) any { return c.Relay.Auto }, true},
		{"-autonat", func(c Config) any { return c.AutoNat }, true},
		{"-hostAddrs /ip4/0.0.0.0/tcp/4001,/ip4/0.0.0.0/udp/4001/quic-v1", func(c Config) any { return len(c.HostAddresses) }, 2},
		{"-announceAddrs /ip4/1.2.3.4/tcp/4001", func(c Config) any { return c.AnnounceAddresses.String() }, "/ip4/1.2.3.4/tcp/4001"},
		{"-noListenAddrs", func(c Config) any { return c.NoListen }, true},
		{"-metricsAddr 127.0.0.1:9400", func(c Config) any { return c.MetricsAddress }, "127.0.0.1:9400"},
		{"-f " + document, func(c Config) any { return c.Echo }, true},
		{"-i", func(c Config) any { return c.Quiet }, true},
		{"-pprof", func(c Config) any { return c.PProf.Enabled }, true},
		{"-pprofPort 6061", func(c Config) any { return c.PProf.Port }, uint(6061)},
		{"-noise=false", func(c Config) any { return c.Security.Noise }, false},
		{"-tls=false", func(c Config) any { return c.Security.TLS }, false},
		{"-plaintext=false", func(c Config) any { return c.Security.Plaintext }, false},
		{"-forceReachabilityPublic", func(c Config) any { return c.ForceReachability }, "public"},
		{"-forceReachabilityPrivate", func(c Config) any { return c.ForceReachability }, "private"},
		{"-muxer yamux", func(c Config) any { return c.Muxer }, "yamux"},
		{"-echo", func(c Config) any { return c.Echo }, true},
	} {
		t.Run(strings.Fields(test.args)[0], func(t *testing.T) {
			c, err := Parse(strings.Fields(test.args), strings.NewReader(`{"Quiet":true}`), &bytes.Buffer{})
			if err != nil {
				t.Fatal(err)
			}
			if got := test.got(c); !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

func TestOwnFlags(t *testing.T) {
	c := parse(t, "-userAgent", "lloom/1", "-protocolVersion", "/lloom/1.0.0", "-streamsPerProtocolPeer", "9", "-connsPerIP", "8",
		"-controlMode", "0660", "-controlAllowRemote", "-exitOnStdinEOF", "-psk", "f", "-mdns", "-mdnsServiceTag", "_l._udp",
		"-staticRelays", somePeer, "-holePunch", "-relayMaxCircuits", "0", "-relayMaxReservations", "2", "-relayLimitData", "3", "-relayLimitDuration", "4s")
	want := Default()
	want.UserAgent, want.ProtocolVersion = "lloom/1", "/lloom/1.0.0"
	want.StreamsPerProtocolPeer, want.ConnsPerIP = 9, 8
	want.ControlMode, want.ControlAllowRemote, want.ExitOnStdinEOF = 0o660, true, true
	want.PSK, want.MDNS = "f", MDNS{Enabled: true, ServiceTag: "_l._udp"}
	if err := want.StaticRelays.Set(somePeer); err != nil {
		t.Fatal(err)
	}
	want.HolePunch = true
	want.Relay.MaxCircuits, want.Relay.MaxReservations, want.Relay.LimitData, want.Relay.LimitDuration = 0, 2, 3, Duration(4*time.Second)
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestDefaultsAreSafe(t *testing.T) {
	c := parse(t)
	if c.Security.Plaintext || !c.Security.Noise || !c.Security.TLS {
		t.Errorf("secure channels: %+v", c.Security)
	}
	if c.Echo || c.Relay.Hop || c.Bootstrap.Enabled || c.MDNS.Enabled || c.ControlAllowRemote || c.PProf.Enabled {
		t.Errorf("a service is on by default: %+v", c)
	}
	if c.ControlMode != 0o600 {
		t.Errorf("control mode %v", c.ControlMode)
	}
	if !c.PubSub.Sign || !c.PubSub.SignStrict {
		t.Errorf("pubsub: %+v", c.PubSub)
	}
}

func TestRefused(t *testing.T) {
	for args, part := range map[string]string{
		"-plaintext":                                         "unencrypted connections are not supported",
		"-noise=false -tls=false":                            "at least one channel security protocol",
		"-muxer mplex":                                       "only yamux is supported",
		"-b":                                                 "never joins the public IPFS network",
		"-bootstrapPeers /ip4/1.2.3.4/tcp/1":                 "end every address in /p2p/",
		"-staticRelays /ip4/1.2.3.4/tcp/1":                   "end every address in /p2p/",
		"-listen /ip4/0.0.0.0/tcp/1":                         "not loopback",
		"-listen /ip4/127.0.0.1/udp/1":                       "unix socket or TCP",
		"-hostAddrs nonsense":                                "must begin with /",
		"-hostAddrs /ip4/1.2.3.4/udp/1":                      "TCP, WebSocket and QUIC",
		"-hostAddrs /dns/a/tcp/1":                            "TCP, WebSocket and QUIC",
		"-psk f -hostAddrs /ip4/127.0.0.1/udp/1/quic-v1":     "TCP only",
		"-relay=false -relayHop":                             "needs the circuit transport",
		"-relay=false -holePunch":                            "needs the circuit transport",
		"-pubsub -pubsubRouter x":                            "neither gossipsub nor floodsub",
		"-metricsAddr 9400":                                  "not host:port",
		"-streamsPerProtocolPeer 0":                          "not between",
		"-connsPerIP -1":                                     "not between",
		"-connManager -connLo 9 -connHi 3":                   "low mark",
		"-controlMode 0400":                                  "owner must be able",
		"-controlMode rw":                                    "octal mode",
		"-gossipsubHeartbeatInterval -1s":                    "cannot be negative",
		"-gossipsubDegree -1":                                "not between",
		"-forceReachabilityPublic -forceReachabilityPrivate": "cannot be both",
		"-i -exitOnStdinEOF":                                 "both the document and the lifeline",
		"-unknown":                                           "not defined: -unknown",
		"word":                                               "unexpected argument",
	} {
		t.Run(args, func(t *testing.T) {
			_, err := Parse(strings.Fields(args), strings.NewReader("{}"), &bytes.Buffer{})
			if !errors.Is(err, ErrUsage) {
				t.Fatalf("got %v, want a usage error", err)
			}
			if !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %q, want one line with %q", err, part)
			}
		})
	}
}

func TestDocument(t *testing.T) {
	const document = `{
		"ListenAddr": "/unix/run/doc.sock", "DHT": {"Mode": "client"}, "QUIC": true,
		"HostAddresses": ["/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/2"],
		"AnnounceAddresses": "/ip4/1.2.3.4/tcp/1,/ip4/1.2.3.4/tcp/2",
		"PubSub": {"Enabled": true, "GossipSubHeartbeat": {"Interval": 2000000000, "InitialDelay": "3s"}},
		"ControlMode": "0660"}`
	c, err := Parse([]string{"-i", "-dhtServer", "-listen", "/unix/run/flag.sock"}, strings.NewReader(document), &bytes.Buffer{})
	if err != nil {
		t.Fatal(err)
	}
	if c.ListenAddr.String() != "/unix/run/flag.sock" || c.DHT.Mode != DHTServer {
		t.Errorf("an explicit flag must win: %s %s", c.ListenAddr.String(), c.DHT.Mode)
	}
	if len(c.HostAddresses) != 2 || len(c.AnnounceAddresses) != 2 || c.ControlMode != 0o660 {
		t.Errorf("document not taken over: %+v", c)
	}
	if p := c.PubSub; !p.Enabled || p.Router != "gossipsub" || p.GossipSubHeartbeat != (GossipSubHeartbeat{Duration(2 * time.Second), Duration(3 * time.Second)}) {
		t.Errorf("pubsub %+v", p)
	}

	for name, bad := range map[string]string{
		"misspelled": `{"Ecko":true}`, "no JSON": `hello`, "two": `{} {}`, "unsafe": `{"Security":{"Plaintext":true}}`,
		"mode": `{"DHT":{"Mode":"x"}}`, "address": `{"ListenAddr":"x"}`, "large": `{"ID":"` + strings.Repeat("x", maxDocumentBytes) + `"}`,
	} {
		if _, err := Parse([]string{"-i"}, strings.NewReader(bad), &bytes.Buffer{}); !errors.Is(err, ErrUsage) {
			t.Errorf("%s: got %v, want a usage error", name, err)
		}
	}
	if _, err := Parse([]string{"-f", filepath.Join(t.TempDir(), "none")}, nil, nil); err == nil || errors.Is(err, ErrUsage) {
		t.Errorf("missing document: got %v", err)
	}
}

func TestHelpNamesEveryFlagAndVersionIsAsked(t *testing.T) {
	var help bytes.Buffer
	if _, err := Parse([]string{"-help"}, nil, &help); !errors.Is(err, ErrHelp) {
		t.Fatal(err)
	}
	for _, flag := range []string{"-listen", "-exitOnStdinEOF", "-controlMode", "-staticRelays", "-mdns", "-psk", "-userAgent"} {
		if !strings.Contains(help.String(), flag) {
			t.Errorf("help lacks %s", flag)
		}
	}
	if _, err := Parse([]string{"-version"}, nil, &help); !errors.Is(err, ErrVersion) {
		t.Fatal(err)
	}
}
