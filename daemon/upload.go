package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/buildpacks/build"
	"github.com/m3o/m3o/gitserver"
)

// Limits of an upload.
const (
	maxPiece     = 8 << 20
	maxTreeFile  = 1 << 30
	maxImageFile = 8 << 30
	uploadLife   = time.Hour // of one that nobody goes on with, and of an image not deployed
	maxUploads   = 16        // at once
)

// uploads are files on their way here, and images that came so and wait for
// their deploy. They are in memory: a restart of the daemon ends them.
type uploads struct {
	mu     sync.Mutex // guards what follows
	files  map[string]*upload
	images map[string]uploaded // by app and digest
}

type upload struct {
	mu   sync.Mutex // held while a piece is written
	app  string
	file *os.File
	size int64
	used time.Time // guarded by uploads.mu
}

type uploaded struct {
	res build.Result
	at  time.Time
}

// drop removes what nobody goes on with. Called with mu held.
func (u *uploads) drop(now time.Time) {
	for id, f := range u.files {
		if now.Sub(f.used) > uploadLife {
			u.end(id)
		}
	}
	for k, i := range u.images {
		if now.Sub(i.at) > uploadLife {
			delete(u.images, k)
		}
	}
}

// end forgets a file. Called with mu held.
func (u *uploads) end(id string) {
	if f := u.files[id]; f != nil {
		delete(u.files, id)
		_ = f.file.Close()
		_ = os.Remove(f.file.Name())
	}
}

// piece finds or begins the file that a piece belongs to.
func (d *Daemon) piece(app, id string) (string, *upload, error) {
	u := &d.uploads
	u.mu.Lock()
	defer u.mu.Unlock()
	u.drop(time.Now())
	if id != "" {
		f := u.files[id]
		if f == nil || f.app != app {
			return "", nil, &m3o.Error{Kind: m3o.NotFound, Msg: "the upload was given up meanwhile", Hint: "run m3o deploy again"}
		}
		f.used = time.Now()
		return id, f, nil
	}
	if len(u.files) >= maxUploads {
		return "", nil, &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("%d uploads are on their way already", maxUploads), Hint: "try again in a moment"}
	}
	id = rand.Text()
	dir := d.cfg.path("uploads")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", nil, fmt.Errorf("make upload directory: %w", err)
	}
	file, err := os.OpenFile(filepath.Join(dir, id), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return "", nil, fmt.Errorf("begin upload: %w", err)
	}
	if u.files == nil {
		u.files, u.images = map[string]*upload{}, map[string]uploaded{}
	}
	f := &upload{app: app, file: file, used: time.Now()}
	u.files[id] = f
	return id, f, nil
}

// sweepUploads removes what a daemon before this one left.
func (d *Daemon) sweepUploads() error {
	err := os.RemoveAll(d.cfg.path("uploads"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// takePiece stores one piece and, after the last, makes what the file is.
func (d *Daemon) takePiece(ctx context.Context, user string, m *m3ov1.UploadRequest) (*m3ov1.UploadResponse, error) {
	if len(m.Data) > maxPiece {
		return nil, m3o.Errorf(m3o.Invalid, "a piece has more than %d MB", maxPiece>>20)
	}
	id, f, err := d.piece(m.App, m.Id)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	keep := false
	defer func() {
		if !keep {
			d.uploads.mu.Lock()
			d.uploads.end(id)
			d.uploads.mu.Unlock()
		}
	}()
	limit := int64(maxTreeFile)
	if m.Kind == m3ov1.UploadKind_UPLOAD_KIND_IMAGE {
		limit = maxImageFile
	}
	if m.Offset != f.size || f.size+int64(len(m.Data)) > limit {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the upload is larger than %d GB, or its pieces are out of order", limit>>30), Hint: "list what a build does not need in .gitignore"}
	}
	if _, err := f.file.Write(m.Data); err != nil {
		return nil, fmt.Errorf("write upload: %w", err)
	}
	f.size += int64(len(m.Data))
	if !m.Last {
		keep = true
		return &m3ov1.UploadResponse{Id: id}, nil
	}
	if _, err := f.file.Seek(0, 0); err != nil {
		return nil, fmt.Errorf("read upload: %w", err)
	}
	switch m.Kind {
	case m3ov1.UploadKind_UPLOAD_KIND_TREE:
		commit, err := d.commitUpload(ctx, user, m, f)
		return &m3ov1.UploadResponse{Id: id, Commit: commit}, err
	case m3ov1.UploadKind_UPLOAD_KIND_IMAGE:
		d.imagesMu.RLock()
		res, err := d.builder.Import(ctx, m.App, f.file)
		d.imagesMu.RUnlock()
		if err != nil {
			return nil, err
		}
		d.uploads.mu.Lock()
		d.uploads.images[m.App+" "+res.Image] = uploaded{res, time.Now()}
		d.uploads.mu.Unlock()
		return &m3ov1.UploadResponse{Id: id, Image: res.Image}, nil
	}
	return nil, m3o.Errorf(m3o.Invalid, "the upload does not say what it is")
}

// commitUpload makes a commit of an uploaded tree.
func (d *Daemon) commitUpload(ctx context.Context, user string, m *m3ov1.UploadRequest, f *upload) (string, error) {
	repo, err := d.repo(ctx, m.App)
	if err != nil {
		return "", err
	}
	message := m.Message
	if message == "" {
		message = "m3o deploy"
	}
	return gitserver.CommitTar(ctx, repo, gitserver.UploadRefs+rand.Text(), user, message, f.file)
}

// repo is the directory of an app's repository.
func (d *Daemon) repo(ctx context.Context, app string) (string, error) {
	a, err := d.ledger.App(ctx, app)
	if err != nil {
		return "", err
	}
	return d.git.Repo(ctx, app, a.DeployBranch())
}
