package node

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/libp2p/go-libp2p/core/crypto"

	"github.com/lloom/lloom-sidecar/daemon/internal/fault"
)

// ErrKeyFormat means that a file holds no libp2p-marshalled private key.
var ErrKeyFormat = errors.New("not a libp2p-marshalled private key")

// maxKeyFileBytes is far above an RSA 8192 key; a wrong path must not be read whole.
const maxKeyFileBytes = 64 << 10

// readIdentity reads the key at path. Keys of every type that libp2p knows are
// taken. The error never holds a byte of the file.
func readIdentity(path string, warn func(string)) (crypto.PrivKey, error) {
	what := "key file (-id) " + path
	body, err := readSecret(path, "-id", maxKeyFileBytes, warn)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fault.New(what, err, "create it with lloom-sidecar init, or leave -id out for a fresh identity")
		}
		return nil, fault.New(what, err, "name a readable key file")
	}
	key, err := crypto.UnmarshalPrivateKey(body)
	if err != nil {
		// The library's own text is left out: it could quote what it parsed.
		return nil, fault.New(what, ErrKeyFormat, "name a key made by lloom-sidecar init or p2p-keygen (PEM, OpenSSH and raw keys must be converted)")
	}
	return key, nil
}

// readSecret reads a regular file of at most limit bytes and warns if other
// users can read it.
func readSecret(path, flag string, limit int64, warn func(string)) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, pathCause(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, pathCause(err)
	}
	if info.IsDir() {
		return nil, errors.New("it is a folder")
	}
	if mode := info.Mode().Perm(); info.Mode().IsRegular() && mode&0o077 != 0 {
		warn(fmt.Sprintf("file (%s) %s can be read or changed by other users (mode %#o); chmod 600 %s", flag, path, mode, path))
	}
	body, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, pathCause(err)
	}
	if int64(len(body)) > limit {
		return nil, fmt.Errorf("it is larger than %d bytes", limit)
	}
	return body, nil
}

// pathCause drops the operation and the path that os errors repeat.
func pathCause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
