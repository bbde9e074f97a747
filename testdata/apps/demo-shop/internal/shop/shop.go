// Package shop is the shop's three services, all in memory.
package shop

import (
	"context"
	"fmt"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	shopv1 "example.com/demo-shop/proto/shop/v1"
)

// Catalog is what is for sale.
type Catalog struct {
	shopv1.UnimplementedCatalogServer
	products []*shopv1.Product
}

// NewCatalog has three products.
func NewCatalog() *Catalog {
	product := func(id, name string, units int64, categories ...string) *shopv1.Product {
		return &shopv1.Product{Id: id, Name: name, Price: &shopv1.Money{CurrencyCode: "EUR", Units: units}, Categories: categories}
	}
	return &Catalog{products: []*shopv1.Product{
		product("mug", "Mug", 9, "kitchen"), product("lamp", "Lamp", 35, "home", "light"), product("watch", "Watch", 120, "accessories"),
	}}
}

// ListProducts gives them all.
func (c *Catalog) ListProducts(context.Context, *emptypb.Empty) (*shopv1.ListProductsResponse, error) {
	return &shopv1.ListProductsResponse{Products: c.products}, nil
}

// GetProduct finds one by id.
func (c *Catalog) GetProduct(_ context.Context, r *shopv1.GetProductRequest) (*shopv1.Product, error) {
	for _, p := range c.products {
		if p.GetId() == r.GetId() {
			return p, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "no product %q", r.GetId())
}

// Carts are the carts of all users.
type Carts struct {
	shopv1.UnimplementedCartServer
	mu     sync.Mutex // guards byUser
	byUser map[string][]*shopv1.CartItem
}

// NewCarts has no carts.
func NewCarts() *Carts { return &Carts{byUser: map[string][]*shopv1.CartItem{}} }

// AddItem puts an item into a cart.
func (c *Carts) AddItem(_ context.Context, r *shopv1.AddItemRequest) (*emptypb.Empty, error) {
	if r.GetUserId() == "" || r.GetItem().GetQuantity() < 1 {
		return nil, status.Error(codes.InvalidArgument, "a user and a quantity are needed")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.byUser[r.GetUserId()] = append(c.byUser[r.GetUserId()], r.GetItem())
	return &emptypb.Empty{}, nil
}

// GetCart is a user's cart.
func (c *Carts) GetCart(_ context.Context, r *shopv1.GetCartRequest) (*shopv1.CartContents, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &shopv1.CartContents{UserId: r.GetUserId(), Items: append([]*shopv1.CartItem(nil), c.byUser[r.GetUserId()]...)}, nil
}

func (c *Carts) take(user string) []*shopv1.CartItem {
	c.mu.Lock()
	defer c.mu.Unlock()
	items := c.byUser[user]
	delete(c.byUser, user)
	return items
}

// Checkout turns carts into orders.
type Checkout struct {
	shopv1.UnimplementedCheckoutServer
	catalog *Catalog
	carts   *Carts
	mu      sync.Mutex // guards orders
	orders  int
}

// NewCheckout sells from catalog what is in carts.
func NewCheckout(catalog *Catalog, carts *Carts) *Checkout {
	return &Checkout{catalog: catalog, carts: carts}
}

// PlaceOrder orders a user's cart and empties it.
func (c *Checkout) PlaceOrder(ctx context.Context, r *shopv1.PlaceOrderRequest) (*shopv1.Order, error) {
	items := c.carts.take(r.GetUserId())
	if len(items) == 0 {
		return nil, status.Errorf(codes.FailedPrecondition, "the cart of %q is empty", r.GetUserId())
	}
	total := &shopv1.Money{CurrencyCode: "EUR"}
	for _, it := range items {
		p, err := c.catalog.GetProduct(ctx, &shopv1.GetProductRequest{Id: it.GetProductId()})
		if err != nil {
			return nil, err
		}
		total.Units += p.GetPrice().GetUnits() * int64(it.GetQuantity())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.orders++
	return &shopv1.Order{Id: fmt.Sprintf("order-%d", c.orders), Items: items, Total: total, Placed: timestamppb.Now()}, nil
}
