package lifecycle

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p-daemon/p2pclient"
	ps "github.com/libp2p/go-libp2p-pubsub"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	tls "github.com/libp2p/go-libp2p/p2p/security/tls"
	ma "github.com/multiformats/go-multiaddr"
)

const echoProtocol = "/lloom/test-echo/1.0.0"

// TestIdentify reads what a foreign host learns.
func TestIdentify(t *testing.T) {
	d := start(t, hostAddrs(loopback), "-userAgent", "lloom/9.9", "-protocolVersion", "/lloom/1.0.0")
	h := foreign(t)
	connect(t, h, d)
	eventually(t, startTimeout, "identify", func() bool {
		agent, _ := h.Peerstore().Get(d.id, "AgentVersion")
		version, _ := h.Peerstore().Get(d.id, "ProtocolVersion")
		return agent == "lloom/9.9" && version == "/lloom/1.0.0"
	})
	protocols, err := h.Peerstore().GetProtocols(d.id)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []protocol.ID{"/echo/1.0.0", "/libp2p/circuit/relay/0.2.0/hop"} {
		if slices.Contains(protocols, off) {
			t.Errorf("%s is served by default", off)
		}
	}
}

// TestPlaintextIsRefusedOnTheWire speaks multistream-select itself and asks for
// the unencrypted channel, then for Noise on the same connection.
func TestPlaintextIsRefusedOnTheWire(t *testing.T) {
	d := start(t, hostAddrs(loopback))
	port, err := d.addrs[0].ValueForProtocol(ma.P_TCP)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp4", "127.0.0.1:"+port)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(startTimeout))
	r := bufio.NewReader(c)
	for _, step := range []struct{ say, answer string }{
		{"/multistream/1.0.0", "/multistream/1.0.0"}, {"/plaintext/2.0.0", "na"}, {noise.ID, noise.ID},
	} {
		line := step.say + "\n"
		if _, err := c.Write(append(binary.AppendUvarint(nil, uint64(len(line))), line...)); err != nil {
			t.Fatal(err)
		}
		n, err := binary.ReadUvarint(r)
		if err != nil || n > 1024 {
			t.Fatalf("%q: length %d: %v", step.say, n, err)
		}
		answer := make([]byte, n)
		if _, err := io.ReadFull(r, answer); err != nil {
			t.Fatal(err)
		}
		if string(answer) != step.answer+"\n" {
			t.Errorf("%q was answered %q, want %q", step.say, answer, step.answer)
		}
	}
}

// TestEachSecureChannelAlone connects with one channel on the foreign side.
func TestEachSecureChannelAlone(t *testing.T) {
	d := start(t, hostAddrs(loopback))
	connect(t, foreign(t, libp2p.Security(noise.ID, noise.New)), d)
	connect(t, foreign(t, libp2p.Security(tls.ID, tls.New)), d)
	onlyNoise := start(t, hostAddrs(loopback), "-tls=false")
	connect(t, foreign(t, libp2p.Security(noise.ID, noise.New)), onlyNoise)
	if err := foreign(t, libp2p.Security(tls.ID, tls.New)).Connect(t.Context(), onlyNoise.info()); err == nil {
		t.Error("TLS was taken although it is off")
	}
}

// TestManyStreamsFromOnePeer holds streams from one peer open at once, each
// through the control protocol's handler socket and back.
func TestManyStreamsFromOnePeer(t *testing.T) {
	for name, test := range map[string]struct {
		addr    string
		streams int
	}{
		"tcp":  {loopback, 1200},
		"quic": {"/ip4/127.0.0.1/udp/0/quic-v1", 200}, // 256 a connection is QUIC's own limit in go-libp2p
	} {
		t.Run(name, func(t *testing.T) {
			d := start(t, hostAddrs(test.addr))
			if err := d.client.NewStreamHandler([]string{echoProtocol}, func(_ *p2pclient.StreamInfo, c io.ReadWriteCloser) {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}); err != nil {
				t.Fatal(err)
			}
			h := foreign(t)
			connect(t, h, d)
			ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
			defer cancel()
			var (
				wg   sync.WaitGroup
				gate = make(chan struct{}, 64)
				fail = make(chan error, test.streams)
			)
			for i := range test.streams {
				wg.Go(func() {
					gate <- struct{}{}
					defer func() { <-gate }()
					s, err := h.NewStream(ctx, d.id, echoProtocol)
					if err != nil {
						fail <- fmt.Errorf("stream %d: %w", i, err)
						return
					}
					// It stays open until the test ends.
					word := fmt.Appendf(nil, "%08d", i)
					_ = s.SetDeadline(time.Now().Add(30 * time.Second))
					if _, err := s.Write(word); err != nil {
						fail <- fmt.Errorf("stream %d: %w", i, err)
						return
					}
					if _, err := io.ReadFull(s, word); err != nil {
						fail <- fmt.Errorf("stream %d: %w", i, err)
					}
				})
			}
			wg.Wait()
			close(fail)
			bad := 0
			for err := range fail {
				if bad++; bad == 1 {
					t.Error(err)
				}
			}
			if bad > 0 {
				t.Errorf("%d of %d streams failed", bad, test.streams)
			}
		})
	}
}

// TestStreamLimitHolds lowers the limit and runs over it.
func TestStreamLimitHolds(t *testing.T) {
	d := start(t, hostAddrs(loopback), "-echo", "-streamsPerProtocolPeer", "100")
	h := foreign(t)
	connect(t, h, d)
	served := 0
	for range 300 {
		s, err := h.NewStream(t.Context(), d.id, "/echo/1.0.0")
		if err != nil {
			continue
		}
		_ = s.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := s.Write([]byte{1}); err != nil {
			continue
		}
		if _, err := io.ReadFull(s, make([]byte, 1)); err == nil {
			served++
		}
	}
	if served != 100 {
		t.Errorf("%d streams served, want 100", served)
	}
}

// TestHeartbeatFlagsTakeEffect uses that two subscribers which meet after they
// have subscribed only graft in a heartbeat. The foreign side's own heartbeat is
// an hour away, so a GRAFT from the daemon is a heartbeat of the daemon.
func TestHeartbeatFlagsTakeEffect(t *testing.T) {
	params := ps.DefaultGossipSubParams()
	params.HeartbeatInitialDelay, params.HeartbeatInterval = time.Hour, time.Hour
	for name, test := range map[string]struct {
		args  []string
		beats bool
	}{
		"fast":          {[]string{"-gossipsubHeartbeatInterval=100ms"}, true},
		"library's":     {nil, true},
		"slow interval": {[]string{"-gossipsubHeartbeatInterval=1h"}, false}, // the first beat, after 100 ms, is over
		"late start":    {[]string{"-gossipsubHeartbeatInitialDelay=1h"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := start(t, append(test.args, "-pubsub", hostAddrs(loopback))...)
			if _, err := d.client.Subscribe(t.Context(), "topic"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(300 * time.Millisecond) // the initial delay of the slow case

			h := foreign(t)
			graft := make(chan struct{}, 1)
			inspect := func(_ peer.ID, rpc *ps.RPC) error {
				if len(rpc.GetControl().GetGraft()) > 0 {
					select {
					case graft <- struct{}{}:
					default:
					}
				}
				return nil
			}
			router, err := ps.NewGossipSub(t.Context(), h, ps.WithGossipSubParams(params), ps.WithAppSpecificRpcInspector(inspect))
			if err != nil {
				t.Fatal(err)
			}
			topic, err := router.Join("topic")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := topic.Subscribe(); err != nil {
				t.Fatal(err)
			}
			connect(t, h, d)
			limit := startTimeout
			if !test.beats {
				limit = 2500 * time.Millisecond
			}
			select {
			case <-graft:
				if !test.beats {
					t.Error("a heartbeat came although the flag puts it off for an hour")
				}
			case <-time.After(limit):
				if test.beats {
					t.Error("no heartbeat")
				}
			}
		})
	}
}

// TestPrivateNetwork lets in only who has the key.
func TestPrivateNetwork(t *testing.T) {
	t.Parallel() // a wrong key shows as a time-out
	key := make([]byte, 32)
	copy(key, "a key that everybody may know")
	path := filepath.Join(t.TempDir(), "psk")
	if err := os.WriteFile(path, []byte(hex.EncodeToString(key)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := start(t, hostAddrs(loopback), "-psk", path, "-dhtServer", "-autonat")
	connect(t, foreign(t, libp2p.PrivateNetwork(key)), d)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if err := foreign(t).Connect(ctx, d.info()); err == nil {
		t.Error("a stranger came in")
	}
}

// TestRelay reserves with a static relay, announces the circuit although the
// relay's address is not public, and is reached over it.
func TestRelay(t *testing.T) {
	relay := start(t, hostAddrs(loopback), "-relayHop")
	hidden := start(t, hostAddrs(loopback), "-forceReachabilityPrivate", "-staticRelays", relayAddr(relay))
	if err := hidden.client.NewStreamHandler([]string{echoProtocol}, func(_ *p2pclient.StreamInfo, c io.ReadWriteCloser) {
		defer c.Close()
		_, _ = io.Copy(c, c)
	}); err != nil {
		t.Fatal(err)
	}
	circuit := ma.StringCast(relayAddr(relay) + "/p2p-circuit")
	eventually(t, startTimeout, "the circuit is announced", func() bool {
		_, addrs, err := hidden.client.Identify()
		return err == nil && ma.Contains(addrs, circuit)
	})
	h := foreign(t)
	if err := h.Connect(t.Context(), peer.AddrInfo{ID: hidden.id, Addrs: []ma.Multiaddr{circuit}}); err != nil {
		t.Fatal(err)
	}
	s, err := h.NewStream(network.WithAllowLimitedConn(t.Context(), "test"), hidden.id, echoProtocol)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Conn().RemoteMultiaddr().ValueForProtocol(ma.P_CIRCUIT); err != nil || !s.Conn().Stat().Limited {
		t.Fatalf("not over the relay: %s", s.Conn().RemoteMultiaddr())
	}
	// More than libp2p's own 128 KiB go through a circuit.
	body := make([]byte, 1<<20)
	go func() { _, _ = s.Write(body) }()
	_ = s.SetReadDeadline(time.Now().Add(startTimeout))
	if _, err := io.ReadFull(s, body); err != nil {
		t.Error(err)
	}
}

// TestRelayIsOffByDefault asks for a reservation.
func TestRelayIsOffByDefault(t *testing.T) {
	d := start(t, hostAddrs(loopback))
	h := foreign(t)
	connect(t, h, d)
	if _, err := client.Reserve(t.Context(), h, d.info()); err == nil {
		t.Error("a reservation was given")
	}
}

// TestBootstrapOutlivesAbsentPeers starts before its peers do.
func TestBootstrapOutlivesAbsentPeers(t *testing.T) {
	t.Parallel() // libp2p waits 5 s before it dials the same address again
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("/ip4/127.0.0.1/tcp/%d", l.Addr().(*net.TCPAddr).Port)
	l.Close()
	key := foreign(t, libp2p.NoListenAddrs)
	id := key.ID()
	d := start(t, hostAddrs(loopback), "-b", "-bootstrapPeers", addr+"/p2p/"+id.String(), "-dhtServer")
	eventually(t, startTimeout, "a warning", func() bool { return strings.Contains(d.stderr.String(), "p2pd: warning: bootstrap (-b)") })
	late := foreign(t, libp2p.Identity(key.Peerstore().PrivKey(id)), libp2p.ListenAddrStrings(addr))
	eventually(t, startTimeout, "the connection", func() bool { return len(late.Network().Peers()) == 1 })
}

// TestProfilerIsOnLocalhost reads the address that the daemon names.
func TestProfilerIsOnLocalhost(t *testing.T) {
	d := start(t, "-pprof")
	_, url, found := strings.Cut(d.stderr.String(), "p2pd: pprof at ")
	if !found || !strings.HasPrefix(url, "http://127.0.0.1:") && !strings.HasPrefix(url, "http://[::1]:") {
		t.Fatalf("no address: %q", d.stderr.String())
	}
	answer, err := http.Get(strings.TrimSpace(url))
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		t.Errorf("status %d", answer.StatusCode)
	}
}

// TestMetricsDoNotServeTheProfiler reads both addresses.
func TestMetricsDoNotServeTheProfiler(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	start(t, hostAddrs(loopback), "-metricsAddr", addr)
	for path, want := range map[string]int{"/metrics": http.StatusOK, "/debug/pprof/": http.StatusNotFound} {
		answer, err := http.Get("http://" + addr + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(answer.Body)
		answer.Body.Close()
		if answer.StatusCode != want || (want == http.StatusOK && !strings.Contains(string(body), "libp2p_")) {
			t.Errorf("%s: %d, %d bytes", path, answer.StatusCode, len(body))
		}
	}
}
