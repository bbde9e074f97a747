package daemon

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/internal/atomicfile"
	"github.com/m3o/m3o/router"
)

// makeState makes the state directory's folders and, on a first start, the
// keys: the git server's host key, the key that seals config, the internal CA.
func (d *Daemon) makeState() error {
	for _, dir := range []string{"", "keys", "run", "repos", "builds", "traits", "descriptors", "router", "store", "runtime", "build"} {
		if err := os.MkdirAll(d.cfg.path(dir), 0o700); err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
	}
	// The root of an app's user namespace, who is nobody, looks up what its
	// container is made of; everything else in here stays closed.
	if err := errors.Join(os.Chmod(d.cfg.Data, 0o711), os.Chmod(d.cfg.path("runtime"), 0o711)); err != nil {
		return fmt.Errorf("open state directory: %w", err)
	}
	var err error
	if d.hostKey, err = keyFile(d.cfg.path("keys", "ssh_host_ed25519"), gitserver.GenerateHostKey); err != nil {
		return fmt.Errorf("git server's host key: %w", err)
	}
	sealing, err := keyFile(d.cfg.path("keys", "config.key"), func() ([]byte, error) {
		k := make([]byte, len(d.configKey))
		_, err := rand.Read(k)
		return k, err
	})
	if err != nil {
		return fmt.Errorf("config key: %w", err)
	}
	if copy(d.configKey[:], sealing) != len(d.configKey) || len(sealing) != len(d.configKey) {
		return fmt.Errorf("config key: %s has %d bytes, want %d; restore it from a backup", d.cfg.path("keys", "config.key"), len(sealing), len(d.configKey))
	}
	// It makes the CA once, and refuses one that was made for another domain.
	if err := router.NewCA(d.cfg.path("ca"), d.cfg.Domain); err != nil {
		return err
	}
	if d.caPEM, err = os.ReadFile(d.caFile()); err != nil {
		return fmt.Errorf("read internal CA: %w", err)
	}
	return nil
}

func (d *Daemon) caFile() string { return d.cfg.path("ca", "ca.crt") }

// caFingerprint is the SHA-256 of the CA's certificate, as m3o login shows it.
func (d *Daemon) caFingerprint() string {
	b, _ := pem.Decode(d.caPEM)
	if b == nil {
		return ""
	}
	sum := sha256.Sum256(b.Bytes)
	return "SHA256:" + strings.ToUpper(hex.EncodeToString(sum[:]))
}

// keyFile reads a key, or makes it and writes it once.
func keyFile(path string, generate func() ([]byte, error)) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err == nil {
		return b, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if b, err = generate(); err != nil {
		return nil, err
	}
	return b, atomicfile.Write(path, b, 0o600)
}
