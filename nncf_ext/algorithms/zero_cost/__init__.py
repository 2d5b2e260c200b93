"""The method: how good will a network be, told from one batch without training (EZNAS and the classic proxies)?"""
