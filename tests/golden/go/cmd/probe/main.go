// Command probe looks at a p2pd from outside, as a foreign go-libp2p host or as
// a bare socket, and prints one JSON object to standard output:
//
//	probe -addr MULTIADDR/p2p/ID                          what identify says
//	probe -addr MULTIADDR/p2p/ID -plaintext               is unencrypted libp2p refused?
//	probe -addr MULTIADDR/p2p/ID -hello-garbage PROTO HEX write bytes, print the answer
//
// Exit status 1 means that the question could not be put, not that the answer
// was an unwelcome one.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

const (
	// timeout bounds dialling, and the wait for an answer.
	timeout = 5 * time.Second
	// maxAnswerBytes bounds what is read from the far side.
	maxAnswerBytes = 1 << 20
	// maxLineBytes is multistream-select's own limit for a line.
	maxLineBytes = 64 << 10

	plaintextID   = "/plaintext/2.0.0"
	multistreamID = "/multistream/1.0.0"
)

func main() {
	addr := flag.String("addr", "", "`multiaddr` of the peer, ending in /p2p/<id>")
	plaintext := flag.Bool("plaintext", false, "ask for the unencrypted channel over a bare TCP connection")
	garbage := flag.Bool("hello-garbage", false, "open a stream of PROTO and write HEX, both given as arguments")
	flag.Parse()

	info, err := peer.AddrInfoFromString(*addr)
	if err != nil {
		fail(fmt.Errorf("-addr: %w", err))
	}
	var result any
	switch {
	case *plaintext:
		result, err = askPlaintext(info)
	case *garbage:
		if flag.NArg() != 2 {
			fail(errors.New("-hello-garbage needs PROTO and HEX"))
		}
		result, err = writeGarbage(info, protocol.ID(flag.Arg(0)), flag.Arg(1))
	default:
		result, err = identify(info)
	}
	if err != nil {
		fail(err)
	}
	e := json.NewEncoder(os.Stdout)
	e.SetEscapeHTML(false)
	if err := e.Encode(result); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "probe:", err)
	os.Exit(1)
}

// connected returns a foreign host, which offers Noise only, with a connection
// to info on which identify has ended.
func connected(ctx context.Context, info *peer.AddrInfo) (host.Host, error) {
	h, err := libp2p.New(libp2p.NoListenAddrs, libp2p.Security(noise.ID, noise.New), libp2p.DisableMetrics(), libp2p.UserAgent("lloom-probe"))
	if err != nil {
		return nil, err
	}
	identified, err := h.EventBus().Subscribe([]any{new(event.EvtPeerIdentificationCompleted), new(event.EvtPeerIdentificationFailed)})
	if err == nil {
		defer identified.Close()
		err = h.Connect(ctx, *info)
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	select {
	case <-identified.Out():
		return h, nil
	case <-ctx.Done():
		h.Close()
		return nil, fmt.Errorf("identify: %w", ctx.Err())
	}
}

// identified is what identify says.
type identified struct {
	Agent           string        `json:"agent"`
	ProtocolVersion string        `json:"protocolVersion"`
	Protocols       []protocol.ID `json:"protocols"`
}

func identify(info *peer.AddrInfo) (identified, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	h, err := connected(ctx, info)
	if err != nil {
		return identified{}, err
	}
	defer h.Close()
	var out identified
	for key, field := range map[string]*string{"AgentVersion": &out.Agent, "ProtocolVersion": &out.ProtocolVersion} {
		v, err := h.Peerstore().Get(info.ID, key)
		if err != nil {
			return identified{}, fmt.Errorf("identify told no %s: %w", key, err)
		}
		*field, _ = v.(string)
	}
	out.Protocols, err = h.Peerstore().GetProtocols(info.ID)
	return out, err
}

// refusal is the far side's answer to the offer of an unencrypted channel.
type refusal struct {
	Refused bool     `json:"refused"`
	Said    []string `json:"said"`
	Error   string   `json:"error,omitempty"`
}

// askPlaintext speaks multistream-select itself: a host cannot be made to offer
// a channel that its library no longer has.
func askPlaintext(info *peer.AddrInfo) (refusal, error) {
	tcp := firstTCP(info.Addrs)
	if tcp == nil {
		return refusal{}, errors.New("-plaintext needs a TCP address")
	}
	c, err := manet.Dial(tcp)
	if err != nil {
		return refusal{}, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return refusal{}, err
	}
	r := bufio.NewReader(c)
	out := refusal{Said: []string{}}
	for _, line := range []string{multistreamID, plaintextID} {
		if _, err := c.Write(encodeLine(line)); err != nil {
			return refused(out, err), nil
		}
		answer, err := readLine(r)
		if err != nil {
			// Closing the connection is a refusal too.
			return refused(out, err), nil
		}
		out.Said = append(out.Said, answer)
	}
	out.Refused = out.Said[1] != plaintextID
	return out, nil
}

func refused(r refusal, err error) refusal {
	r.Refused, r.Error = true, err.Error()
	return r
}

// firstTCP is the bare TCP part of the first address that has one.
func firstTCP(addrs []ma.Multiaddr) ma.Multiaddr {
	for _, a := range addrs {
		if len(a) >= 2 && a[1].Protocol().Code == ma.P_TCP {
			return a[:2]
		}
	}
	return nil
}

func encodeLine(s string) []byte {
	return append(binary.AppendUvarint(nil, uint64(len(s)+1)), s+"\n"...)
}

func readLine(r *bufio.Reader) (string, error) {
	n, err := binary.ReadUvarint(r)
	if err != nil {
		return "", err
	}
	if n > maxLineBytes {
		return "", fmt.Errorf("a line of %d bytes", n)
	}
	line := make([]byte, n)
	if _, err := io.ReadFull(r, line); err != nil {
		return "", err
	}
	return strings.TrimSuffix(string(line), "\n"), nil
}

// answer is what came back after the bytes were written.
type answer struct {
	Answer string `json:"answer"`
	// Ended is how reading ended: eof, reset or timeout.
	Ended string `json:"ended"`
	Error string `json:"error,omitempty"`
}

func writeGarbage(info *peer.AddrInfo, proto protocol.ID, text string) (answer, error) {
	body, err := hex.DecodeString(text)
	if err != nil {
		return answer{}, fmt.Errorf("HEX: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*timeout)
	defer cancel()
	h, err := connected(ctx, info)
	if err != nil {
		return answer{}, err
	}
	defer h.Close()
	s, err := h.NewStream(ctx, info.ID, proto)
	if err != nil {
		return answer{}, err
	}
	defer s.Reset()
	if err := s.SetDeadline(time.Now().Add(timeout)); err != nil {
		return answer{}, err
	}
	// A far side that resets while this still writes has answered.
	_, writeErr := s.Write(body)
	read, err := io.ReadAll(io.LimitReader(s, maxAnswerBytes))
	if err == nil {
		err = writeErr
	}
	out := answer{Answer: hex.EncodeToString(read), Ended: "eof"}
	if err != nil {
		out.Error = err.Error()
		out.Ended = "reset"
		// The multiplexer has a time-out error of its own beside the os package's.
		var netErr net.Error
		if errors.As(err, &netErr) && netErr.Timeout() {
			out.Ended = "timeout"
		}
	}
	return out, nil
}
