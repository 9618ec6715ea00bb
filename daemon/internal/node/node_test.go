package node

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/lloom/lloom-sidecar/daemon/internal/config"
)

func write(t *testing.T, body []byte, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, body, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestIdentityTakesEveryKeyTypeAndWarns(t *testing.T) {
	for name, kind := range map[string]struct{ typ, bits int }{
		"ed25519": {crypto.Ed25519, 0}, "rsa": {crypto.RSA, 2048}, "secp256k1": {crypto.Secp256k1, 0}, "ecdsa": {crypto.ECDSA, 0},
	} {
		key, _, err := crypto.GenerateKeyPairWithReader(kind.typ, kind.bits, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		body, err := crypto.MarshalPrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		for mode, warnings := range map[os.FileMode]int{0o600: 0, 0o400: 0, 0o640: 1, 0o644: 1} {
			var lines []string
			got, err := readIdentity(write(t, body, mode), func(s string) { lines = append(lines, s) })
			if err != nil || !got.Equals(key) {
				t.Errorf("%s: %v", name, err)
			}
			if len(lines) != warnings {
				t.Errorf("%s %v: warnings %q", name, mode, lines)
			}
		}
	}
}

func TestIdentityRefusesWithoutQuoting(t *testing.T) {
	secret := "-----BEGIN OPENSSH PRIVATE KEY-----c2VjcmV0"
	for name, path := range map[string]string{
		"foreign": write(t, []byte(secret), 0o600), "empty": write(t, nil, 0o600),
		"truncated": write(t, []byte{8, 1, 18, 64, 1, 2, 3}, 0o600), "large": write(t, make([]byte, maxKeyFileBytes+1), 0o600),
		"missing": filepath.Join(t.TempDir(), "none"), "folder": t.TempDir(),
	} {
		_, err := readIdentity(path, func(string) {})
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		if strings.Contains(err.Error(), "c2Vj") || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "; ") {
			t.Errorf("%s: %q", name, err)
		}
	}
	if _, err := readIdentity(write(t, []byte(secret), 0o600), func(string) {}); !errors.Is(err, ErrKeyFormat) {
		t.Errorf("got %v", err)
	}
}

func TestPSKForms(t *testing.T) {
	key := bytes.Repeat([]byte{0xab}, 31)
	key = append(key, '\n') // raw keys may end in white space
	text := hex.EncodeToString(key)
	for name, body := range map[string]string{
		"hex": text, "hex line": text + "\n", "upper": strings.ToUpper(text), "raw": string(key),
		"swarm.key": "/key/swarm/psk/1.0.0/\n/base16/\n" + text + "\n",
	} {
		got, err := parsePSK([]byte(body))
		if err != nil || !bytes.Equal(got, key) {
			t.Errorf("%s: %x %v", name, got, err)
		}
	}
	for name, body := range map[string]string{
		"empty": "", "short": text[:62], "no hex": strings.Repeat("z", 64), "bad swarm.key": "/key/swarm/psk/1.0.0/\n/base16/\nzz",
	} {
		if _, err := parsePSK([]byte(body)); !errors.Is(err, ErrPSKFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPorts(t *testing.T) {
	tcp, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	_, tcpPort, _ := net.SplitHostPort(tcp.Addr().String())
	_, udpPort, _ := net.SplitHostPort(udp.LocalAddr().String())
	for _, busy := range []string{"/ip4/127.0.0.1/tcp/" + tcpPort, "/ip4/0.0.0.0/tcp/" + tcpPort + "/ws", "/ip4/127.0.0.1/udp/" + udpPort + "/quic-v1"} {
		if err := checkPorts([]ma.Multiaddr{ma.StringCast(busy)}); !errors.Is(err, ErrPortBusy) {
			t.Errorf("%s: %v", busy, err)
		}
	}
	for _, free := range []string{"/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"} {
		if err := checkPorts([]ma.Multiaddr{ma.StringCast(free)}); err != nil {
			t.Errorf("%s: %v", free, err)
		}
	}
	if err := checkPorts([]ma.Multiaddr{ma.StringCast("/ip4/192.0.2.1/tcp/4001")}); err == nil || errors.Is(err, ErrPortBusy) {
		t.Errorf("foreign address: %v", err)
	}
}

func TestListeningIsCompared(t *testing.T) {
	have := []ma.Multiaddr{ma.StringCast("/ip4/127.0.0.1/tcp/4001"), ma.StringCast("/ip4/127.0.0.1/udp/5/quic-v1")}
	for asked, ok := range map[string]bool{
		"/ip4/127.0.0.1/tcp/4001": true, "/ip4/127.0.0.1/tcp/0": true, "/ip4/127.0.0.1/udp/0/quic-v1": true,
		"/ip4/127.0.0.1/tcp/4002": false, "/ip4/127.0.0.2/tcp/4001": false, "/ip4/127.0.0.1/tcp/4001/ws": false,
	} {
		if err := checkListening([]ma.Multiaddr{ma.StringCast(asked)}, have); (err == nil) != ok {
			t.Errorf("%s: %v", asked, err)
		}
	}
}

func TestRelayLimits(t *testing.T) {
	r := config.Default().Relay
	res := relayResources(r)
	if res.MaxCircuits != config.DefaultRelayMaxCircuits || res.MaxReservationsPerIP != config.DefaultRelayMaxReservations || res.Limit.Data != config.DefaultRelayLimitData || res.Limit.Duration != config.DefaultRelayLimitDuration {
		t.Errorf("defaults: %+v %+v", res, res.Limit)
	}
	r.LimitData = 0
	if res := relayResources(r); res.Limit.Data != math.MaxInt64 || res.Limit.Duration != config.DefaultRelayLimitDuration {
		t.Errorf("no data limit: %+v", res.Limit)
	}
	r.LimitDuration, r.MaxReservations, r.HopLimit = 0, 0, 7
	if res := relayResources(r); res.Limit != nil || res.MaxReservations != math.MaxInt32 || res.MaxCircuits != 7 {
		t.Errorf("unlimited: %+v", res)
	}
	r.HopLimit, r.MaxCircuits = 0, 0
	if n := relayCircuits(r); n < 1<<20 || 2*busyPeers*n < 0 {
		t.Errorf("unlimited circuits: %d", n)
	}
	if d := relayResources(config.Relay{LimitData: 1}).Limit.Duration; d/time.Second > math.MaxUint32 {
		t.Errorf("%v does not fit the wire", d)
	}
}

// TestOneAddressAndOnePeer asks the resource manager itself, for the smallest
// machine that libp2p scales to.
func TestOneAddressAndOnePeer(t *testing.T) {
	limits := scaledLimits(1200, 0)
	m, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(limits.Scale(0, 1024)),
		rcmgr.WithLimitPerSubnet([]rcmgr.ConnLimitPerSubnet{{PrefixLength: 32, ConnCount: 30}}, nil),
		rcmgr.WithConnRateLimiters(newConnRateLimiter(30)))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for i := range 1200 {
		s, err := m.OpenStream("peer", network.DirInbound)
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		if err := s.SetProtocol("/lloom/request/1.0.0"); err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		if err := s.ReserveMemory(streamWindowBytes, 255); err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
	}
	s, err := m.OpenStream("peer", network.DirInbound)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetProtocol("/lloom/request/1.0.0"); err == nil {
		t.Error("the limit does not hold")
	}
	for i := range 31 {
		_, err := m.OpenConnection(network.DirInbound, true, ma.StringCast("/ip4/203.0.113.9/tcp/4001"))
		if (err == nil) != (i < 30) {
			t.Errorf("connection %d: %v", i, err)
		}
	}
}
