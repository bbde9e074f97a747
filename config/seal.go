package config

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/m3o/m3o"
)

// sealed is one value at rest: AES-256-GCM, bound to where it stands.
type sealed struct {
	Format int    // 1
	Box    []byte // nonce, ciphertext and tag
}

const sealFormat = 1

type sealer struct{ aead cipher.AEAD }

// newSealer derives the sealing key from key, so that other uses of the
// daemon's key do not meet this one. The AEAD makes its own random 96-bit
// nonces: safe for 2^32 values under one key, far beyond what people set.
func newSealer(key [32]byte) (sealer, error) {
	if key == [32]byte{} {
		return sealer{}, errors.New("the key is all zero")
	}
	sub, err := hkdf.Key(sha256.New, key[:], nil, "m3o config values v1", 32)
	if err != nil {
		return sealer{}, fmt.Errorf("derive key: %w", err)
	}
	block, err := aes.NewCipher(sub)
	if err != nil {
		return sealer{}, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	return sealer{aead}, err
}

// place is the associated data: a box moved to another app, revision or name,
// or said to be no secret any more, does not open. No part can have a NUL.
func place(app string, n int, name string, secret bool) []byte {
	return fmt.Appendf(nil, "%s\x00%d\x00%s\x00%t", app, n, name, secret)
}

// seal keeps the length of the value visible: it is no secret worth the space.
func (s sealer) seal(v m3o.Secret, where []byte) sealed {
	return sealed{sealFormat, s.aead.Seal(nil, nil, []byte(v.Reveal()), where)}
}

func (s sealer) open(b sealed, where []byte) (m3o.Secret, error) {
	if b.Format != sealFormat {
		return "", fmt.Errorf("sealed value has format %d", b.Format)
	}
	v, err := s.aead.Open(nil, nil, b.Box, where)
	if err != nil {
		return "", &m3o.Error{Msg: "a config value does not open: the key is another, or the record was changed or moved",
			Hint: "restore the key file that belongs to this data directory", Err: err}
	}
	return m3o.Secret(v), nil
}

// A Sealed is a secret as it may be stored outside config: in a record of its
// owner, which cannot be opened anywhere else.
type Sealed struct{ sealed }

// Seal closes a secret that belongs to where: the kind of record and its key,
// such as "notifier hello/3". Only Unseal with the same where opens it.
func (c *Config) Seal(v m3o.Secret, where string) Sealed {
	return Sealed{c.seal.seal(v, place("", 0, where, true))}
}

// Unseal opens what Seal closed.
func (c *Config) Unseal(b Sealed, where string) (m3o.Secret, error) {
	return c.seal.open(b.sealed, place("", 0, where, true))
}
