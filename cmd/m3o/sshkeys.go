package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

const (
	// maxKeys bounds the keys tried in one login, as sshd bounds them.
	maxKeys = 6
	// agentTime is long: an agent may ask a person for each use.
	agentTime = time.Minute
	// windowsAgent is where OpenSSH for Windows listens.
	windowsAgent = `\\.\pipe\openssh-ssh-agent`
)

// defaultKeys are the private keys ssh itself would try, best first.
var defaultKeys = [...]string{"id_ed25519", "id_ecdsa", "id_rsa"}

var errNoPassphrase = errors.New("no passphrase given")

// A key can sign, by the agent that holds it or by its file.
type key struct {
	public  ssh.PublicKey
	comment string
	from    string // "agent" or the file, for messages
	signer  func(context.Context) (ssh.Signer, error)
}

func (k *key) fingerprint() string { return ssh.FingerprintSHA256(k.public) }

// line is the public key as in authorized_keys.
func (k *key) line() string {
	l := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k.public)))
	if c := strings.TrimSpace(plain(k.comment)); c != "" {
		l += " " + c
	}
	return l
}

func (k *key) sign(ctx context.Context, data []byte) (*ssh.Signature, error) {
	s, err := k.signer(ctx)
	if err != nil {
		return nil, err
	}
	if as, ok := s.(ssh.AlgorithmSigner); ok && k.public.Type() == ssh.KeyAlgoRSA {
		sig, err := as.SignWithAlgorithm(rand.Reader, data, ssh.KeyAlgoRSASHA512)
		return sig, wrapSign(err, k)
	}
	sig, err := s.Sign(rand.Reader, data)
	return sig, wrapSign(err, k)
}

func wrapSign(err error, k *key) error {
	if err == nil {
		return nil
	}
	return &failure{msg: fmt.Sprintf("signing with %s (%s): %v", k.fingerprint(), k.from, err), exit: 1, err: err}
}

// usable are the types whose signature is one blob, as Login takes it. Those
// of security keys (sk-…) carry a counter beside it, certificates a signer.
func usable(keyType string) bool {
	switch keyType {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521, ssh.KeyAlgoRSA:
		return true
	}
	return false
}

// A keyring is the keys of this user, in the order to try them.
type keyring struct {
	keys  []*key
	agent io.Closer // nil when there is none
}

func (r *keyring) close() {
	if r.agent != nil {
		_ = r.agent.Close()
	}
}

// openKeys finds the keys of the agent and of ~/.ssh, or the one that file
// names. A private key is opened only to sign, and never when the agent has it.
func (c *call) openKeys(ctx context.Context, file string) (*keyring, error) {
	r := &keyring{}
	held, closer, err := c.agentKeys(ctx)
	if err != nil {
		c.say("m3o: warning: the SSH agent does not answer: %v", err)
	}
	r.agent = closer
	if file != "" {
		k, err := c.fileKey(file)
		if err != nil {
			r.close()
			return nil, err
		}
		if i := slices.IndexFunc(held, func(h *key) bool { return h.fingerprint() == k.fingerprint() }); i >= 0 {
			k = held[i]
		}
		r.keys = []*key{k}
		return r, nil
	}
	r.keys = held
	home, err := c.home()
	if err != nil {
		return r, err
	}
	for _, name := range defaultKeys {
		k, err := c.fileKey(filepath.Join(home, ".ssh", name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			c.say("m3o: warning: %v", err)
		case !slices.ContainsFunc(r.keys, func(h *key) bool { return h.fingerprint() == k.fingerprint() }):
			r.keys = append(r.keys, k)
		}
	}
	if len(r.keys) == 0 {
		r.close()
		return nil, fail("no SSH key found, in the agent or as ~/.ssh/"+strings.Join(defaultKeys[:], ", ~/.ssh/"),
			"ssh-keygen -t ed25519 makes one; --key FILE names another")
	}
	if len(r.keys) > maxKeys {
		c.say("m3o: warning: only the first %d of %d keys are tried; --key FILE names one", maxKeys, len(r.keys))
		r.keys = r.keys[:maxKeys]
	}
	return r, nil
}

// agentKeys asks the agent. No agent is no error.
func (s *system) agentKeys(ctx context.Context) ([]*key, io.Closer, error) {
	var conn io.ReadWriteCloser
	switch sock := s.env("SSH_AUTH_SOCK"); {
	case sock != "":
		d := net.Dialer{Timeout: dialTime}
		c, err := d.DialContext(ctx, "unix", sock)
		if err != nil {
			return nil, nil, err
		}
		if err := c.SetDeadline(time.Now().Add(agentTime)); err != nil {
			return nil, c, err
		}
		conn = c
	case goruntime.GOOS == "windows":
		f, err := os.OpenFile(windowsAgent, os.O_RDWR, 0)
		if err != nil {
			return nil, nil, nil
		}
		conn = f
	default:
		return nil, nil, nil
	}
	a := agent.NewClient(conn)
	listed, err := a.List()
	if err != nil {
		return nil, conn, err
	}
	signers, err := a.Signers()
	if err != nil {
		return nil, conn, err
	}
	var keys []*key
	for _, signer := range signers {
		if !usable(signer.PublicKey().Type()) {
			continue
		}
		k := &key{public: signer.PublicKey(), from: "agent", signer: func(context.Context) (ssh.Signer, error) { return signer, nil }}
		for _, l := range listed {
			if string(l.Blob) == string(k.public.Marshal()) {
				k.comment = l.Comment
			}
		}
		keys = append(keys, k)
	}
	slices.SortStableFunc(keys, func(a, b *key) int { return rank(a) - rank(b) })
	return keys, conn, nil
}

func rank(k *key) int {
	return slices.IndexFunc(defaultKeys[:], func(n string) bool {
		kind := strings.TrimPrefix(n, "id_")
		return strings.Contains(k.public.Type(), kind)
	})
}

// fileKey reads a private key, or the public key of one that the agent may hold.
func (c *call) fileKey(path string) (*key, error) {
	data, err := readSmall(path)
	if err != nil {
		return nil, err
	}
	k := &key{from: path}
	if pub, comment, _, _, err := ssh.ParseAuthorizedKey(data); err == nil {
		k.public, k.comment = pub, comment
		k.signer = func(context.Context) (ssh.Signer, error) {
			return nil, fail(path+" is a public key, and the agent does not hold its private one", "ssh-add, or --key with the private key")
		}
		return k, checkUsable(k)
	}
	if pub, comment, err := publicBeside(path); err == nil {
		k.public, k.comment = pub, comment
	}
	signer, err := ssh.ParsePrivateKey(data)
	if missing, ok := errors.AsType[*ssh.PassphraseMissingError](err); ok {
		if missing.PublicKey != nil {
			k.public = missing.PublicKey
		}
		if k.public == nil {
			return nil, fail(path+" is encrypted, and "+path+".pub is not there", "ssh-keygen -y -f "+quote(path)+" > "+quote(path+".pub"))
		}
		k.signer = func(ctx context.Context) (ssh.Signer, error) { return c.unlock(ctx, path, data) }
		return k, checkUsable(k)
	}
	if err != nil {
		return nil, fail(path+" is no private SSH key: "+err.Error(), "")
	}
	k.public = signer.PublicKey()
	k.signer = func(context.Context) (ssh.Signer, error) { return signer, nil }
	return k, checkUsable(k)
}

func checkUsable(k *key) error {
	if usable(k.public.Type()) {
		return nil
	}
	return fail(fmt.Sprintf("%s is of type %s, which m3o login cannot use", k.from, k.public.Type()), "ssh-keygen -t ed25519")
}

// unlock asks for the passphrase of a private key, three times as ssh does.
func (c *call) unlock(ctx context.Context, path string, data []byte) (ssh.Signer, error) {
	if !c.inTerminal {
		return nil, fail(path+" has a passphrase, and there is no terminal to ask on", "ssh-add "+quote(path)+" gives it to the agent")
	}
	for range 3 {
		_, _ = fmt.Fprintf(c.err, "Passphrase for %s: ", path)
		pass, err := c.secret(ctx)
		c.say("")
		if err != nil {
			return nil, err
		}
		if pass == "" {
			return nil, errNoPassphrase
		}
		signer, err := ssh.ParsePrivateKeyWithPassphrase(data, []byte(pass))
		if err == nil {
			return signer, nil
		}
		c.say("that is not it")
	}
	return nil, fail("no right passphrase for "+path, "")
}

func publicBeside(path string) (ssh.PublicKey, string, error) {
	data, err := readSmall(path + ".pub")
	if err != nil {
		return nil, "", err
	}
	pub, comment, _, _, err := ssh.ParseAuthorizedKey(data)
	return pub, comment, err
}

// readSmall reads a file that is at most as large as maxInput.
func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	data, err := io.ReadAll(io.LimitReader(f, maxInput+1))
	if err == nil && len(data) > maxInput {
		return nil, fail(path+" is larger than 1 MB", "")
	}
	return data, err
}
