package node

import (
	"bytes"
	"encoding/hex"
	"errors"

	"github.com/libp2p/go-libp2p/core/pnet"

	"github.com/lloom/lloom-sidecar/daemon/internal/fault"
)

// ErrPSKFormat means that a file holds no pre-shared key in a known form.
var ErrPSKFormat = errors.New("not a pre-shared key")

// pskBytes is the length of a private network's key.
const pskBytes = 32

// maxPSKFileBytes holds every accepted form with its line ends.
const maxPSKFileBytes = 4 << 10

// readPSK reads a private network's key in one of three forms: the swarm.key
// format, 64 hex digits with an optional line end, or 32 raw bytes.
func readPSK(path string, warn func(string)) (pnet.PSK, error) {
	what := "pre-shared key file (-psk) " + path
	body, err := readSecret(path, "-psk", maxPSKFileBytes, warn)
	if err != nil {
		return nil, fault.New(what, err, "name a readable key file")
	}
	key, err := parsePSK(body)
	if err != nil {
		return nil, fault.New(what, err, "it must be in swarm.key format, 64 hex digits, or 32 bytes")
	}
	return key, nil
}

func parsePSK(body []byte) (pnet.PSK, error) {
	if bytes.HasPrefix(body, []byte("/key/swarm/psk/")) {
		key, err := pnet.DecodeV1PSK(bytes.NewReader(body))
		if err != nil {
			// The library's text quotes the file.
			return nil, ErrPSKFormat
		}
		return key, nil
	}
	// Raw bytes are recognised by length first: 32 bytes can end in white space.
	if len(body) == pskBytes {
		return pnet.PSK(body), nil
	}
	text := bytes.TrimSpace(body)
	if len(text) == hex.EncodedLen(pskBytes) {
		key := make([]byte, pskBytes)
		if _, err := hex.Decode(key, text); err == nil {
			return key, nil
		}
	}
	return nil, ErrPSKFormat
}
